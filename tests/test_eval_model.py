"""Log-likelihoods, answers and runs of an evaluation with a tiny model."""

import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import warm
from tiny import SENTENCES, tiny_conversations, tiny_model, tiny_tokenizer, write_jsonl

from aquila_sft.errors import UserError
from aquila_sft.evaluation import forward
from aquila_sft.evaluation.choosing import Chooser, Choosing

ROOT = Path(__file__).parents[1]
OWN = ROOT / "tests/eval_reference/items"
NO_AUTOCAST = torch.no_grad  # any context that changes nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model(made, tiny_tokenizer(made), initializer_range=0.15)
    return made


@pytest.fixture(scope="module")
def parts(folder):
    from aquila_sft import model as models
    from aquila_sft import swap
    from aquila_sft.tokenizer import load_tokenizer

    model = models.load(folder).eval()
    swap.install(model, "torch")
    return model, load_tokenizer(folder)


def scorer_of(parts, tmp_path, *, share=True, batch_tokens=512):
    from aquila_sft.evaluation.journal import Journal
    from aquila_sft.evaluation.scorer import Scorer, Settings, autocast_of

    return Scorer(
        *parts, Journal(tmp_path / "journal", "0" * 64), Settings(batch_tokens, share, autocast_of("cpu", "fp32"))
    )


def plain_log_prob(model, context, continuation) -> float:
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def ids(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(1500, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


# ---- forward ----


def test_branches_behind_one_context_score_as_rows_of_their_own(parts):
    model, _ = parts
    groups = [
        forward.Group(ids(0, 9), (ids(1, 4), ids(2, 1), ids(3, 7))),
        forward.Group(ids(4, 1), (ids(5, 3), ids(6, 3))),  # a context of one token: nothing is shared
        forward.Group(ids(7, 20), (ids(8, 2),)),
    ]
    found = forward.log_probs(model, groups, 0, NO_AUTOCAST)
    for group, values in zip(groups, found, strict=True):
        for continuation, value in zip(group.continuations, values, strict=True):
            assert value == pytest.approx(plain_log_prob(model, group.context, continuation), abs=1e-4)


def test_rows_without_branches_are_plain_causal_rows(parts):
    model, _ = parts
    groups = [forward.Group(ids(seed, seed + 1), (ids(seed + 50, 3),)) for seed in (0, 4, 11)]
    for group, (value,) in zip(groups, forward.log_probs(model, groups, 0, NO_AUTOCAST), strict=True):
        assert value == pytest.approx(plain_log_prob(model, group.context, group.continuations[0]), abs=1e-4)


def test_a_context_too_long_for_the_model_loses_its_beginning():
    group = forward.fitted(range(100), (7, 8, 9), 10)
    assert group == forward.Group(tuple(range(92, 100)), ((7, 8, 9),))  # inputs: context and all but the last token
    assert len(group.context) + len(group.continuations[0]) - 1 == 10


def test_neighbours_with_one_context_are_grouped_up_to_the_models_length():
    pairs = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), ((1, 2, 3), (7, 8)), ((9, 9), (1,))]
    wide = forward.grouped(pairs, 100)
    assert [places for _, places in wide] == [[0, 1, 2], [3]] and wide[0][0].tokens == 2 + 5
    assert [places for _, places in forward.grouped(pairs, 5)] == [[0, 1], [2], [3]]


def test_batches_hold_every_place_once_longest_first_within_the_tokens():
    sizes = [3, 50, 7, 7, 20, 1]
    made = forward.batches(sizes, 42)
    assert sorted(place for batch in made for place in batch) == list(range(6))
    assert made[0] == [1]  # alone, although it is more than 42
    assert all(max(sizes[i] for i in batch) * len(batch) <= 42 for batch in made[1:])
    assert [sizes[batch[0]] for batch in made] == sorted((sizes[b[0]] for b in made), reverse=True)


def test_greedy_answers_of_a_padded_batch_are_those_of_generate(parts):
    model, tokenizer = parts
    prompts = [list(ids(1, 3)), list(ids(2, 11)), list(ids(3, 6))]
    lengths = [12, 5, 9]
    found = dict(forward.answers(model, prompts, lengths, lambda *_: False, 0, len(tokenizer), NO_AUTOCAST))
    for place, prompt in enumerate(prompts):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=lengths[place], do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found[place] == wanted[0, len(prompt) :].tolist()


def test_a_penalty_of_repetition_is_that_of_generate_in_a_padded_batch_too(parts):
    model, tokenizer = parts
    prompts, lengths = [list(ids(1, 3)), list(ids(2, 11))], [12, 9]
    given = (lambda *_: False, 0, len(tokenizer), NO_AUTOCAST)
    found = dict(forward.answers(model, prompts, lengths, *given, Choosing(repetition_penalty=1.3)))
    assert found != dict(forward.answers(model, prompts, lengths, *given))
    for place, prompt in enumerate(prompts):
        wanted = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=lengths[place],
            do_sample=False,
            repetition_penalty=1.3,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found[place] == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (0.7, 0.0)])
def test_tokens_are_drawn_as_often_as_transformers_says_they_should_be(temperature, top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    wanted = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(-1)[0]
    draws = 20_000
    choose = Chooser(Choosing(temperature, top_p, seed=5), [[0]] * draws, list(map(str, range(draws))), 40, "cpu")
    shares = choose(logits.expand(draws, -1)).bincount(minlength=40) / draws
    assert (shares[wanted == 0] == 0).all()
    deviation = (wanted * (1 - wanted) / draws).sqrt()
    assert ((shares - wanted).abs() <= 4.5 * deviation).all()  # of 40 tokens none is that far off by chance


def test_a_drawn_answer_depends_on_seed_and_stream_alone(parts):
    model, tokenizer = parts
    prompts = [list(ids(1, 3)), list(ids(2, 11)), list(ids(3, 6))]
    given = (lambda *_: False, 0, len(tokenizer), NO_AUTOCAST)
    warm, names = Choosing(temperature=1.0, seed=1), ["a", "b", "c"]
    together = dict(forward.answers(model, prompts, [4, 9, 9], *given, warm, names))
    ((_, alone),) = forward.answers(model, prompts[1:2], [9], *given, warm, names[1:2])
    assert alone == together[1]
    ((_, other),) = forward.answers(model, prompts[1:2], [9], *given, Choosing(temperature=1.0, seed=2), names[1:2])
    assert other != alone


def test_requests_that_choose_in_other_ways_stand_side_by_side(parts, tmp_path):
    warm, how = Choosing(temperature=1.0, seed=1), {"until": [], "max_gen_toks": 8}
    requests = [Request("a b", how), Request("a b", how | {"choosing": warm}), Request("a c", how)]
    greedy, drawn, other = scorer_of(parts, tmp_path / "all").generate_until(requests)
    assert greedy != drawn
    for number, (request, answer) in enumerate(zip(requests, (greedy, drawn, other), strict=True)):
        assert scorer_of(parts, tmp_path / str(number)).generate_until([request]) == [answer]


def test_an_answer_ends_where_it_is_told_to_and_leaves_the_others_alone(parts):
    model, tokenizer = parts
    prompts = [list(ids(1, 3)), list(ids(2, 11))]
    whole = dict(forward.answers(model, prompts, [8, 8], lambda *_: False, 0, len(tokenizer), NO_AUTOCAST))
    cut = dict(
        forward.answers(
            model, prompts, [8, 8], lambda row, new: row == 0 and len(new) == 3, 0, len(tokenizer), NO_AUTOCAST
        )
    )
    assert cut == {0: whole[0][:3], 1: whole[1]}


def test_no_logits_of_all_positions_are_made(parts):
    """The head sees answer tokens alone: memory does not grow with vocabulary x length."""
    from tensors_made import LargestTensors

    model, tokenizer = parts
    group = forward.Group(ids(0, 200), (ids(1, 3), ids(2, 3)))
    with LargestTensors() as made:
        forward.log_probs(model, [group], 0, NO_AUTOCAST)
    assert 6 * len(tokenizer) <= max(made.numels) < 0.5 * group.tokens * len(tokenizer)


# ---- scorer ----


class Request:
    def __init__(self, *args) -> None:
        self.args = args


def test_no_begin_token_stands_before_a_prompt(parts, tmp_path):
    """Of a tokenizer that puts one there when it is not told otherwise, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = parts[0], copy.deepcopy(parts[1])
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    assert tokenizer.encode("The river")[0] == tokenizer.bos_token_id
    scorer = scorer_of((model, tokenizer), tmp_path)
    ((value, _),) = scorer.loglikelihood([Request("The river", " rises")])
    context, whole = (tokenizer.encode(t, add_special_tokens=False) for t in ("The river", "The river rises"))
    assert tokenizer.bos_token_id not in context
    assert value == pytest.approx(plain_log_prob(model, context, whole[len(context) :]), abs=1e-4)


def test_sharing_prefixes_changes_no_score(parts, tmp_path):
    requests = [Request(f"{s}\nAnswer:", f" {t}") for s in SENTENCES[:3] for t in ("yes", "no, never", "水")]
    shared = scorer_of(parts, tmp_path / "a", share=True).loglikelihood(requests)
    apart = scorer_of(parts, tmp_path / "b", share=False).loglikelihood(requests)
    assert [v for v, _ in shared] == pytest.approx([v for v, _ in apart], abs=1e-4)


def test_sharing_prefixes_leaves_sliding_attention_its_window(folder, tmp_path):
    import shutil

    from aquila_sft import model as models
    from aquila_sft import swap
    from aquila_sft.tokenizer import load_tokenizer

    slides = tmp_path / "slides"
    shutil.copytree(folder, slides)
    config = json.loads((slides / "config.json").read_text())
    window = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
    (slides / "config.json").write_text(json.dumps(config | window))
    model = models.load(slides).eval()
    swap.install(model, "torch")
    requests = [Request("The river rises and the river falls.", choice) for choice in (" It rains", " So does a lake")]
    found = {}
    for share in (True, False):
        scorer = scorer_of((model, load_tokenizer(slides)), tmp_path / str(share), share=share)
        found[share] = [value for value, _ in scorer.loglikelihood(requests)]
    assert found[True] == pytest.approx(found[False], abs=1e-4)


def test_bits_per_byte_of_a_text_longer_than_the_model_counts_every_token_once(parts, tmp_path):
    model, tokenizer = parts
    text = "\n".join(SENTENCES)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) > 512
    (found,) = scorer_of(parts, tmp_path).loglikelihood_rolling([Request(text)])
    pieces = [([tokenizer.bos_token_id], tokens[:512])]
    for start in range(512, len(tokens), 512):
        piece = tokens[start : start + 512]
        pieces.append((tokens[start + len(piece) - 513 : start], piece))
    assert sum(len(piece) for _, piece in pieces) == len(tokens)
    assert found == pytest.approx(sum(plain_log_prob(model, *pair) for pair in pieces), rel=1e-5)


def test_damaged_weights_are_one_line(parts, tmp_path):
    import copy

    model, tokenizer = parts
    broken = copy.deepcopy(model)
    from aquila_sft import swap

    swap.install(broken, "torch")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    scorer = scorer_of((broken, tokenizer), tmp_path)
    with pytest.raises(UserError, match="not finite"):
        scorer.loglikelihood([Request("a", " b")])
    with pytest.raises(UserError, match="not finite"):
        scorer.generate_until([Request("a", {"until": [], "max_gen_toks": 2})])


def test_a_journal_cut_anywhere_still_tells_whether_an_answer_stopped(parts, tmp_path):
    request = Request("a b", {"until": [], "max_gen_toks": 3})
    first = scorer_of(parts, tmp_path)
    answer, stopped = first.generate_until([request]), first.has_stopped(*request.args)
    whole = first.journal.file.read_bytes()
    for size in range(0, len(whole), 9):
        first.journal.file.write_bytes(whole[:size])
        again = scorer_of(parts, tmp_path)
        assert (again.generate_until([request]), again.has_stopped(*request.args)) == (answer, stopped)


# ---- runs ----


def worker(folder, out, kill_after=0, processes=1) -> list[dict]:
    out.mkdir(exist_ok=True)
    script, words = ROOT / "tests/eval_worker.py", [str(folder), str(out), str(kill_after)]
    paths = [ROOT, ROOT / "kernels", ROOT / "tests"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    if processes == 1:
        done = warm.run(words, script=script, env=env)
    else:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script)]
        done = subprocess.run([sys.executable, *launch, *words], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == (9 if kill_after else 0), done.stderr
    return [json.loads(file.read_text()) for file in sorted(out.glob("told-*.json"))]


def test_a_killed_evaluation_goes_on_and_two_processes_say_the_same(folder, tmp_path, monkeypatch):
    (unbroken,) = worker(folder, tmp_path / "unbroken")
    worker(folder, tmp_path / "killed", kill_after=20)
    (resumed,) = worker(folder, tmp_path / "killed")
    assert resumed["known"] >= 20 and 0 < resumed["tokens"] < unbroken["tokens"]
    monkeypatch.setenv("LATE_S", "3")  # the second process reads the journal late
    both = worker(folder, tmp_path / "two", processes=2)
    assert len(both) == 2 and both[0]["outcomes"] == both[1]["outcomes"]
    assert [told["of_all"] for told in both] == [unbroken["tokens"]] * 2
    assert sum(told["tokens"] for told in both) == unbroken["tokens"]  # the work is shared, not done twice
    assert both[0]["outcomes"] == unbroken["outcomes"]  # the same batches, so the same bits
    for name, listed in unbroken["outcomes"].items():
        for whole, again in zip(listed, resumed["outcomes"][name], strict=True):
            assert (whole[0].keys(), whole[2]) == (again[0].keys(), again[2])
            assert whole[1] == pytest.approx(again[1], abs=1e-4)  # other rows share a batch


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def train(*words: str, cwd: Path, recipe: str = "eval") -> Done:
    """train.py in this process: the libraries are imported once."""
    spec = importlib.util.spec_from_file_location("train_program", ROOT / "train.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    out, err, kept = io.StringIO(), io.StringIO(), dict(os.environ)
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = program.main([f"recipe={recipe}", "scale=mini", *words])
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory) -> Path:
    """One run of much: benchmarks of a folder, instructions, references, text before and after."""
    out = tmp_path_factory.mktemp("run")
    other = tmp_path_factory.mktemp("before")
    tiny_model(other, tiny_tokenizer(other), initializer_range=0.02)
    write_jsonl(out / "talk.jsonl", tiny_conversations(2))
    write_jsonl(out / "谈.jsonl", tiny_conversations(12))
    (out / "zh.txt").write_text("\n".join(s for s in SENTENCES if not s.isascii()), "utf-8")
    (out / "en.txt").write_text("\n".join(s for s in SENTENCES if s.isascii()), "utf-8")
    (out / "data/ifeval").mkdir(parents=True)
    record = {"key": 1, "prompt": "Answer in lower case. No commas.", "instruction_id_list": ["punctuation:no_comma"]}
    write_jsonl(out / "data/ifeval/input_data.jsonl", [record | {"kwargs": [{}]}] * 2)
    for name in ("hellaswag", "arc_easy", "arc_challenge", "triviaqa", "gsm8k"):
        (out / "data" / name).symlink_to(OWN / name)
    done = train(
        f"model.path={folder}",
        "eval.tasks=[hellaswag,arc,triviaqa,gsm8k,ifeval,instruct_zh,instruct_en,references,text]",
        "eval.data=data",
        "eval.limit=3",
        "eval.max_new_tokens=6",
        "eval.references=[talk.jsonl, 谈.jsonl]",
        f"eval.before={other}",
        "data.files={a: zh.txt, b: en.txt}",
        cwd=out,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "stdout").write_text(done.stdout)
    return out


def test_a_run_leaves_its_table_as_markdown_csv_json_and_every_answer(evaluated):
    out = evaluated / "outputs/mini/eval"
    told = json.loads((out / "results.json").read_text())
    assert [row["row"] for row in told["rows"]] == ["HellaSwag", "ARC (Average)", "TriviaQA", "GSM8K (5-shot)"]
    assert [row["items"] for row in told["rows"]] == [3, 2, 3, 3]
    assert told["rows"][0]["bits_per_byte"] > 0 and told["rows"][0]["chance"] == 25.0
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().split("\n") if line]
    assert sum(a["task"] == "hellaswag" for a in answers) == 3 and len(answers[0]["log_probs"]) == 4
    assert json.loads((out / "summary.json").read_text())["status"] == "done"
    assert (out / "results.md").read_text() in (evaluated / "stdout").read_text()


def test_instructions_stops_and_references_are_measured(evaluated):
    other = json.loads((evaluated / "outputs/mini/eval/results.json").read_text())["other"]
    following = {(row["set"], row["measure"]): row for row in other["Instruction following, with the chat template"]}
    assert ("ifeval", "prompts, strict") in following and ("ifeval", "instructions, loose") in following
    for name in ("instruct_zh", "instruct_en"):
        assert following[name, "answers that stop"]["prompts"] == "3"
    by_language = {row["language"]: float(row["bits per byte"]) for row in other["Reference answers"]}
    assert set(by_language) == {"en", "zh"} and all(0 < value < 20 for value in by_language.values())


def test_every_answer_and_text_is_kept_and_their_sums_are_the_tables(evaluated):
    out = evaluated / "outputs/mini/eval"
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text("utf-8").splitlines()]
    other = json.loads((out / "results.json").read_text("utf-8"))["other"]
    for task, title, column in (
        ("references", "Reference answers", "bits per byte"),
        ("text", "Bits per byte of text", "bits per byte"),
        ("text before", "Bits per byte of text", "before"),
    ):
        mine = [line for line in lines if line["task"] == task]
        assert mine and all(line["where"] and line["source"] for line in mine)
        for row in other[title]:
            of_row = {"language": row["language"]} | ({} if row["source"] == "all" else {"source": row["source"]})
            part = [line["scores"] for line in mine if of_row.items() <= line.items()]
            nats, size = (sum(scores[name] for scores in part) for name in ("nats", "bytes"))
            assert float(row[column]) == pytest.approx(nats / math.log(2) / size, abs=6e-5)
            assert row["bytes"] == str(int(size))
    for task in ("ifeval", "instruct_zh", "instruct_en"):
        stopped = [line["stopped"] for line in lines if line["task"] == task]
        (row,) = (
            row
            for row in other["Instruction following, with the chat template"]
            if (row["set"], row["measure"]) == (task, "answers that stop")
        )
        assert stopped and row["%"] == f"{100 * sum(stopped) / len(stopped):.2f}"


def test_an_answer_longer_than_the_model_counts_every_token_once(parts, tmp_path):
    from aquila_sft.data.conversations import normalise
    from aquila_sft.evaluation import instruct

    context, answer = ids(1, 70), ids(2, 1300)  # the model sees 512
    pieces = instruct.answer_pieces([*context], [*answer], 512)
    assert sum((piece for _, piece in pieces), []) == [*answer]
    assert all([*before, *piece] == [*context, *answer][: len(before) + len(piece)] for before, piece in pieces)
    assert instruct.answer_pieces([*context], [*answer[:443]], 512) == [([*context], [*answer[:443]])]

    def bits(text: str) -> float:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        (found,) = instruct.references(scorer, [("here", normalise({"messages": talk}, "s"))])
        return found.scores["nats"] / math.log(2) / found.scores["bytes"]

    scorer = scorer_of(parts, tmp_path)
    once = bits("The river rises. " * 20)
    assert bits("The river rises. " * 400) == pytest.approx(
        once, rel=0.2
    )  # cut at the model's length it was a fraction


def test_records_that_are_no_conversation_are_told(tmp_path, capsys):
    from aquila_sft.evaluation import instruct

    file = tmp_path / "talk.jsonl"
    write_jsonl(file, [*tiny_conversations(2), {"messages": [{"role": "user", "content": "a"}]}])
    file.write_text(file.read_text("utf-8") + "{torn", "utf-8")
    assert len(instruct.read_references([str(file)], None)) == 2
    assert f"2 records left out, the first: no assistant turn at {file}:3" in capsys.readouterr().out


def test_a_limit_of_references_is_one_for_every_language_and_source(tmp_path):
    from aquila_sft.evaluation import instruct

    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        rows = [{"prompt": asked, "response": told} for asked, told in (("Why?", "Rain."), ("为什么？", "下雨。")) * 3]
        write_jsonl(file, rows)
    found = [conversation for _, conversation in instruct.read_references([*map(str, files)], 2)]
    assert [(c.source, c.language) for c in found] == [(s, w) for s in "ab" for w in ("en", "zh") * 2]


def test_records_that_are_no_text_are_told(tmp_path, capsys):
    from aquila_sft.evaluation import plain_text

    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n{torn\n{"text": 5}\n', "utf-8")
    assert [text.prompt for text in plain_text.read({"a": [file]}, "text", None)] == ["good"]
    assert f"data.files: 2 records left out, the first: not a JSON object at {file}:2" in capsys.readouterr().out


def test_instructions_weigh_alike_and_not_prompts():
    from types import SimpleNamespace

    from aquila_sft.evaluation import instruct
    from aquila_sft.evaluation.engine import Outcome

    records = [{"checks": [[]] * count} for count in (1, 3)]
    outcomes = [Outcome({"prompts": float(s == 1), "instructions": s}, stopped=False) for s in (1.0, 1 / 3)]
    task = SimpleNamespace(task_name="t", outcomes=outcomes, items=[SimpleNamespace(record=r) for r in records])
    _, prompts, instructions, _ = instruct.table([task])
    assert prompts[2:4] == ["50.00", "50.00"] and instructions[2] == "50.00"  # two of four; a mean of prompts is 66.67


def test_text_is_measured_by_language_and_source_before_and_after(evaluated):
    rows = json.loads((evaluated / "outputs/mini/eval/results.json").read_text())["other"]["Bits per byte of text"]
    assert [(row["language"], row["source"]) for row in rows] == [
        ("en", "all"),
        ("en", "b"),
        ("zh", "all"),
        ("zh", "a"),
    ]
    for row in rows:
        change = float(row["bits per byte"]) - float(row["before"])
        assert change == pytest.approx(float(row["change"]), abs=2e-4) and change != 0


def test_the_same_command_again_computes_nothing(evaluated, folder):
    done = train(f"model.path={folder}", "eval.tasks=[hellaswag,arc]", "eval.data=data", "eval.limit=3", cwd=evaluated)
    assert done.returncode == 0 and "goes on:" in done.stdout and "tokens: 0" in done.stdout, done.stdout[-500:]


@pytest.mark.parametrize(
    "words, parts",
    [
        (["eval.tasks=helaswag"], ["eval.tasks=helaswag", "did you mean hellaswag?"]),
        (["eval.tasks=arc"], ["eval.data is not set"]),
        (["eval.tasks=arc", "eval.data=/no/where"], ["eval.data=/no/where: no such folder"]),
        (["eval.tasks=arc", "eval.data=."], ["has no file for arc_easy"]),
        (["eval.tasks=references"], ["eval.references="]),
        (["eval.tasks=references", "eval.references=no.jsonl"], ["eval.references=no.jsonl: no such file"]),
        (["eval.tasks=references", "eval.references=[]"], ["eval.references=[] is not a file, a glob or a list"]),
        (["eval.tasks=ifeval"], ["eval.tasks=ifeval", "eval.data=hub"]),
        (["eval.tasks=instruct_zh", "eval.before=x"], ["eval.before=x", "text"]),
        (["eval.tasks=text", "data.files=no.txt"], ["data.files=no.txt: no such file"]),
        (["eval.tasks=[]"], ["eval.tasks="]),
        (["eval.limit=0"], ["eval.limit=0 must be at least 1"]),
        (["model.path=random"], ["model.path=random"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, parts, folder, tmp_path):
    model = [] if any(w.startswith("model.path") for w in words) else [f"model.path={folder}"]
    done = train(*words, *model, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(part in lines[0] for part in parts), done.stderr


def test_a_model_without_a_tokenizer_is_one_line(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(folder / name)
    done = train(f"model.path={bare}", "eval.tasks=instruct_zh", cwd=tmp_path)
    assert done.returncode == 2 and "neither tokenizer.json nor qwen.tiktoken" in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1, done.stderr


@pytest.mark.parametrize(
    "change, told",
    [
        ({"instruction_id_list": ["foo:bar"]}, "input_data.jsonl:1 is no item of ifeval: KeyError\\('foo:bar'"),
        ({"kwargs": []}, "input_data.jsonl:1 is no item of ifeval: IndexError"),
        ({"kwargs": [{"no_such": 1}]}, "no item of ifeval: TypeError.*no_such"),
        ({"prompt": None}, "an item has a prompt and instructions"),
        ({"instruction_id_list": [], "kwargs": []}, "an item has a prompt and instructions"),
        (None, "input_data.jsonl holds no item of ifeval"),
        ({"instruction_id_list": ["length_constraints:number_sentences"]}, "python -m nltk.downloader punkt_tab"),
    ],
)
def test_ifeval_that_its_rules_cannot_work_with_is_one_line_and_no_host_is_looked_up(
    change, told, tmp_path, monkeypatch
):
    import nltk

    from aquila_sft.evaluation import instruct

    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setattr(nltk.data, "path", [])
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    kwargs = [{"relation": "at least", "num_sentences": 3}] if told.endswith("punkt_tab") else [{}]
    record = {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": kwargs}
    (tmp_path / "ifeval").mkdir()
    write_jsonl(tmp_path / "ifeval/input_data.jsonl", [record | change] if change is not None else [])
    with pytest.raises(UserError, match=told):
        instruct.ifeval_records(str(tmp_path), tmp_path, None)


def test_a_training_evaluates_what_it_made_if_asked(folder, tmp_path):
    write_jsonl(tmp_path / "talk.jsonl", tiny_conversations(40))
    words = [f"model.path={folder}", "data.files=talk.jsonl", "debug=smoke", "train.max_length=128"]
    (tmp_path / "en.txt").write_text("\n\n".join(s for s in SENTENCES if s.isascii()), "utf-8")
    asked = f"evaluate={{tasks: [siqa,winogrande,references,text], data: {OWN}, limit: 2, references: [talk.jsonl], "
    asked += "text: {a: [en.txt], b: en.txt}}"
    done = train(*words, asked, cwd=tmp_path, recipe="sft")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "outputs/mini/sft-smoke/eval/results.json").read_text())
    assert [row["row"] for row in told["rows"]] == ["Winogrande", "SIQA"]
    written = (tmp_path / "outputs/mini/sft-smoke/eval/answers.jsonl").read_text().splitlines()
    of_text = [line for line in map(json.loads, written) if line["task"] == "text"]
    assert {line["source"] for line in of_text} == {"a", "b"}
    slip = train(*words, "evaluate={tasks: [sica]}", cwd=tmp_path, recipe="sft")
    assert slip.returncode == 2 and "did you mean siqa?" in slip.stderr
    other = train(f"model.path={folder}", "evaluate={tasks: [siqa]}", cwd=tmp_path)
    assert other.returncode == 2 and "recipe=eval trains no model" in other.stderr
