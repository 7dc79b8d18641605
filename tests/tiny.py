"""Small stand-ins for tests: a tokenizer, a model and conversations, made in seconds and without files.

    sentences below -> tiny_tokenizer(folder) -> tiny_model(folder, tokenizer)
    tiny_conversations(n) -> rows in Infinity-Instruct's schema -> write_jsonl(path, rows)

The tokenizer has the published one's form (NFC, its split regex, byte-level BPE, specials behind the ranks,
ChatML, pad distinct from eos); only its vocabulary, learnt from these sentences, is small.
"""

import base64
import json
import random
from pathlib import Path

SENTENCES = """
The river rises in the hills north of the town and reaches the sea after ninety kilometres.
She opened the window, looked at the grey sky, and decided to take an umbrella after all.
Water boils at a lower temperature on a mountain because the air pressure is lower there.
My grandfather kept bees, and every August the whole kitchen smelled of honey and smoke.
To make the dough, mix the flour with warm water and salt, then let it rest for an hour.
A good question is often more useful than a quick answer, and it's harder to find.
The library closes at eight o'clock, but you can return books through the slot in the door.
We don't know who built the bridge; the oldest map that shows it was drawn in 1742.
Sort the list first: binary search only works when the numbers are already in order.
The train was late again, so they walked along the canal and talked about the summer.
Plants turn sunlight, water and carbon dioxide into sugar, and release oxygen as they do so.
If you can't explain something in simple words, you probably haven't understood it yet.
The children planted twelve apple trees behind the school and watered them every morning.
Copper conducts electricity well, which is why most of the wires in a house are made of it.
He wrote three letters that winter, and all of them began with the weather.
An even number divided by two leaves no remainder, while an odd number leaves one.
The market sells fresh fish on Fridays, and vegetables from nearby farms all week long.
When the moon passes between the earth and the sun, its shadow falls on the ground.
Please read the instructions carefully before you switch the machine on for the first time.
They have repaired the old clock, and now it strikes the hour a little too early.
Learning a language takes patience: a few new words each day are worth more than a long list.
The museum's new wing holds paintings, maps, coins, and a small collection of musical instruments.
I'm sure we'll find the key; you've only looked in two of your seven pockets so far.
Light travels about three hundred thousand kilometres in a single second.
def area(width, height):
    return width * height
for name in names:
    print(f"Hello, {name}!")
这条河发源于城北的山里，流了九十公里以后才到大海。
她打开窗户看了看灰色的天空，最后还是决定带上雨伞。
山上的气压比较低，所以水在不到一百度的时候就会沸腾。
我的爷爷养蜜蜂，每年八月整个厨房里都是蜂蜜的香味。
做面团的时候，先把面粉和温水、盐混合在一起，再放置一个小时。
一个好问题往往比一个快的答案更有用，也更难找到。
图书馆晚上八点关门，不过您可以把书放进门口的还书箱。
我们不知道这座桥是谁修建的，最早画出它的地图是一七四二年的。
先把列表排好序，因为二分查找只能用在有顺序的数字上。
火车又晚点了，于是他们沿着运河散步，谈起了夏天的事情。
植物利用阳光把水和二氧化碳变成糖，同时放出氧气。
如果你不能用简单的话解释一件事，那么你可能还没有真正理解它。
孩子们在学校后面种了十二棵苹果树，每天早上都去浇水。
铜的导电性能很好，所以房子里的电线大多数是用铜做的。
那年冬天他写了三封信，每一封都是从天气开始的。
偶数除以二没有余数，奇数除以二余一。
市场每个星期五卖新鲜的鱼，附近农场的蔬菜每天都有。
月亮走到地球和太阳之间的时候，它的影子就会落在地面上。
第一次打开机器之前，请仔细阅读说明书。
他们把老钟修好了，现在它报时总是早一点儿。
学习语言需要耐心，每天记住几个新词，比一次背很多词更好。
博物馆的新馆里有绘画、地图、钱币，还有一些乐器。
中国的首都是北京，人口最多的城市是上海和重庆。
春天来了，院子里的花都开了，小鸟在树上唱歌。
光在一秒钟里大约可以走三十万公里。
请问，从这里到火车站怎么走？大概需要多长时间？
谢谢你的帮助！如果以后还有问题，我会再来问你的。
""".strip().split("\n")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_203|>", "<|extra_204|>"]


# The smallest model that trains in a whole run, as words of its command.
TINY_ARCHITECTURE = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.head_dim": 16,
    "model.num_hidden_layers": 2,
}


def tiny_tokenizer(folder: Path, entries: int = 2000):
    """A fast tokenizer of about so many entries, saved in `folder` by save_tokenizer and returned.

    bos <|extra_203|>, eos <|extra_204|>, pad and unk <|endoftext|>, the ChatML template, length limit 512.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from aquila_sft.tokenizer import PATTERN, byte_level_backend, from_backend, save_tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=entries - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    backend = byte_level_backend(model["vocab"], [tuple(m) for m in model["merges"]], SPECIALS)
    bos, eos, pad = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
    tokenizer = from_backend(backend, bos=bos, eos=eos, pad=pad, max_length=512)
    save_tokenizer(tokenizer, Path(folder))
    return tokenizer


def tiny_ranks(tokenizer) -> list[bytes]:
    """The entries of tiny_tokenizer in rank order, spelt as bytes: what a tiktoken rank file lists."""
    from aquila_sft import tokenizer as tokenizers

    byte_of = {letter: byte for byte, letter in enumerate(tokenizers.byte_letters())}
    spelt = sorted((i, text) for text, i in tokenizer.get_vocab().items() if not text.startswith("<|"))
    return [bytes(byte_of[letter] for letter in text) for _, text in spelt]


def write_ranks(path: Path, ranks: list[bytes]) -> None:
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    path.write_bytes(b"".join(lines))


def tiny_model(folder: Path, tokenizer, **config):
    """A two-layer MistralForCausalLM (fp32, seed 0) for `tokenizer`, saved with it in `folder` and returned.

    Keywords override MistralConfig's fields, e.g. num_hidden_layers=4. The caller's random state is kept.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from aquila_sft.tokenizer import save_tokenizer

    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**(settings | config)))
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, Path(folder))
    return model


def tiny_conversations(n: int) -> list[dict]:
    """n rows in Infinity-Instruct's schema, the same for every call: English and Chinese in turn.

    Of every twelve, four have two exchanges and two begin with a system line.
    """
    rng = random.Random(0)
    english = [s for s in SENTENCES if s.isascii() and s[0].isupper()]
    chinese = [s for s in SENTENCES if not s.isascii()]
    rows = []
    for i in range(n):
        zh = i % 2 == 1
        sentences = chinese if zh else english
        if zh:
            system = "你是一个细心的助手。"
            asks = ["请把这句话再说一遍：{}", "这句话的开头是什么？{}", "下面的句子有多少个字？\n{}"]
        else:
            system = "You are a careful assistant."
            asks = ["Repeat this: {}", "How does this begin? {}", "How many letters are in this?\n{}"]
        turns = [{"from": "system", "value": system}] if i % 12 in (4, 9) else []
        for _ in range(2 if i % 6 in (2, 3) else 1):
            kind, sentence = rng.randrange(3), rng.choice(sentences)
            count = sum(c.isalpha() for c in sentence)
            start = sentence[:4] if zh else " ".join(sentence.split()[:3])
            answer = [sentence, start, f"{count}个字。" if zh else f"There are {count} letters."][kind]
            turns.append({"from": "human", "value": asks[kind].format(sentence)})
            turns.append({"from": "gpt", "value": answer})
        rows.append(
            {
                "id": i,
                "conversations": turns,
                "label": {
                    "ability_en": ["text comprehension"],
                    "ability_zh": ["文本理解"],
                    "cate_ability_en": ["language understanding"],
                    "cate_ability_zh": ["语言理解"],
                },
                "langdetect": "zh-cn" if zh else "en",
                "source": "tiny",
                "reward": round(rng.uniform(-5, 15), 3),
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line, UTF-8, Chinese left readable."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
