"""What makes a conversation fit to be learnt from: rules, each a pure function with a switch in data.clean.

    record -> messages (conversations.py) -> RULES, one after the other -> language -> Verdict

A rule takes messages and returns them, says what it mended, and raises Refused with the reason for what it leaves out;
the ledger counts both. Copies and benchmark items are found later, over all conversations (sft_steps.py).
"""

import dataclasses
import functools
import html
import json
import re
from collections.abc import Callable

from aquila_sft.config.data import ConversationPolicy, Detector, Fault
from aquila_sft.data import conversations
from aquila_sft.data.conversations import CALL, RESULT, Refused, in_order, until_last_answer

Messages = list[dict]
Mended = Callable[[str], None]  # called with the name of a repair
Rule = Callable[[Messages, dict, ConversationPolicy, Mended], Messages]  # messages, the record they are from, …


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a record: messages as far as the rules came, and why it is left out, if it is."""

    messages: Messages
    language: str
    source: str
    mended: list[str]
    reason: str | None = None


def judge(record: dict, default_source: str, policy: ConversationPolicy) -> Verdict:
    """All rules, until one refuses."""
    mended: list[str] = []
    messages: Messages = []
    reason = None
    try:
        messages = conversations.messages_of(record)
        for rule in RULES:
            messages = rule(messages, record, policy, mended.append)
    except Refused as refused:
        reason = refused.args[0]
    except RecursionError:  # calls of tools become JSON
        reason = "nested too deeply"
    text = "\n".join(m["content"] for m in messages) or conversations.any_text(record)
    language = language_of(text, policy.detector)
    if reason is None and policy.languages is not None and language not in policy.languages:
        reason = f"language: {language}"
    source = conversations.source_of(record, default_source)
    return Verdict(messages, language, source, list(dict.fromkeys(mended)), reason)


def changed(messages: Messages, change: Callable[[str, str], str]) -> Messages:
    """With change(content, role) as contents; the same object where nothing changes."""
    made = [m | {"content": change(m["content"], m["role"])} for m in messages]
    return messages if made == messages else made


def said_by(messages: Messages, role: str) -> list[str]:
    return [m["content"] for m in messages if m["role"] == role]


# ---- roles


# "Hello, how can I help?" before anybody asked
GREETING = re.compile(
    r"^\W*(hello|hi\b|hey\b|greetings|welcome|good (morning|afternoon|evening)|你好|您好|大家好|嗨|欢迎|早上好|下午好)",
    re.IGNORECASE,
)
INSTRUCTION = re.compile(
    r"^\W*(you (are|will|must|should|can|have)\b|you're\b|your (task|job|role|goal|name)\b"
    r"|(act|think|behave) (as|like)\b|as an? |given |provide |explain |answer |respond |reply |write |read |use "
    r"|follow |solve |imagine |assume |pretend |please |user will |the (assistant|user|following)\b"
    r"|a chat between |this is |in this |here |system\b|instructions?\b"
    r"|你(是|将|要|的(任务|角色|名字|工作)|扮演|现在|需要|可以|会|应)|您(是|将)|作为|请|假[设如]|扮演|用户|系统)",
    re.IGNORECASE,
)


def system_tags(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    """An instruction to the model that stands at the beginning and is tagged as its answer."""
    roles = [m["role"] for m in messages]
    if policy.system_tags is Fault.keep or roles[:2] != ["assistant", "user"] or "assistant" not in roles[2:]:
        return messages
    first = messages[0]["content"]
    if not first.strip() or GREETING.match(first):
        mended("answer before the first question cut")
        return messages[1:]
    if not INSTRUCTION.match(first):
        return messages  # in_order refuses it
    if policy.system_tags is Fault.leave_out:
        raise Refused("system line tagged as an answer")
    mended("system line tagged as an answer")
    return [{"role": "system", "content": first}, *messages[1:]]


def tools(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    """The template knows no tools. Mended, a call is an answer that is learnt and its result a question."""
    if not {CALL, RESULT} & {m["role"] for m in messages}:
        return messages
    if policy.tools is Fault.leave_out:
        raise Refused("turns of tools")
    mended("turns of tools as answers and questions")
    told = {CALL: "assistant", RESULT: "user"}
    messages = [m | {"role": told.get(m["role"], m["role"])} for m in messages]
    listed = record.get("tools")
    if listed and messages[0]["role"] != "system":
        listed = listed if isinstance(listed, str) else json.dumps(listed, ensure_ascii=False)
        messages = [{"role": "system", "content": listed}, *messages]
    return messages


def last_turn(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    answered = until_last_answer(messages)
    if len(answered) < len(messages):
        if policy.last_turn is Fault.leave_out:
            raise Refused("ends without an answer")
        mended("last question, without an answer, cut")
    return answered


def order(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    return in_order(messages)


# ---- characters

LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
# Zero width space and byte order mark: U+200C and U+200D join emoji, and letters of some scripts.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffc\ufffe\uffff\ufdd0-\ufdef]")
REPLACED = "\ufffd"  # what a decoder leaves where bytes made no character


def control_characters(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    if policy.control_characters is Fault.keep:
        return messages
    if any(REPLACED in m["content"] for m in messages):
        raise Refused("text that was decoded wrongly")
    plain = changed(messages, lambda content, role: CONTROL.sub("", LINE_END.sub("\n", content)))
    if plain is not messages:
        if policy.control_characters is Fault.leave_out and any(CONTROL.search(m["content"]) for m in messages):
            raise Refused("control characters")
        mended("control characters taken out, or line ends made plain")
    return plain


ENTITY = re.compile(r"&(?:#39|#x27|#34|quot|apos|amp|lt|gt|nbsp);")
TAG = re.compile(
    r"</?(?:p|div|span|font|strong|em|b|i|u|ul|ol|li|h[1-6]|table|tbody|tr|td|th|center|blockquote)"
    r"(?:\s+[\w-]+\s*=[^<>]*)?\s*>",
    re.IGNORECASE,
)
BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
# Where markup or code is what is spoken of, its signs are what they should be.
MARKUP = re.compile(
    r"^\s*<\w|html|xml|css|jsx|react|vue|angular|svg|markup|web ?page|website|tags?\b|entit(y|ies)|escap(e|ing)"
    r"|&amp;\w+=|```"
    r"|<(!doctype|head|body|script|style|form|input|button|label|img|a)\b|class=|style="
    r"|def |function ?\(|import |#include"
    r"|网页|网站|标签|标记|实体|转义|前端|代码|表格",
    re.IGNORECASE | re.MULTILINE,
)


def html_remnants(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    """What is left of a page: entities, and tags of layout, in a conversation about something else."""
    if policy.html is Fault.keep:
        return messages
    text = "\n".join(m["content"] for m in messages)
    if not ("<" in text or "&" in text):
        return messages
    has_entities, has_tags = ENTITY.search(text), TAG.search(text) or BREAK.search(text)
    about_markup = MARKUP.search(text)
    # Translation services escape quotes and signs of prose and code alike: without a tag, an entity is theirs.
    is_entity = has_entities and not has_tags and not re.search(r"html|xml|entit|escap|实体|转义|&amp;\w+=", text, re.I)
    if not is_entity and (about_markup or not has_tags):
        return messages
    if policy.html is Fault.leave_out:
        raise Refused("remnants of HTML")
    mended("remnants of HTML taken out")

    def plain(content: str, role: str) -> str:
        if has_tags:
            content = TAG.sub("", BREAK.sub("\n", content))
        return ENTITY.sub(lambda found: html.unescape(found[0]).replace("\xa0", " "), content)

    return in_order(changed(messages, plain))


# ---- what a program should have filled in

EMPTY = r"<\s*(?:no[ _]?(?:in|out)put|(?:无|没有)输[入出])\s*>"
MARKER = re.compile(EMPTY, re.IGNORECASE)
MARKER_LINE = re.compile(
    rf"^[ \t]*[\"'`“]?(?:{EMPTY}|(?:无|没有)输入|（无输入）)[\"'`”]?[ \t\d]*$\n?", re.IGNORECASE | re.MULTILINE
)


def markers(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    """<noinput>, for an input slot that was empty. In an answer it means that there was none."""
    if policy.markers is Fault.keep:
        return messages

    def plain(content: str, role: str) -> str:
        return MARKER_LINE.sub("", content).rstrip("\n") if role == "user" and MARKER_LINE.search(content) else content

    mended_messages = changed(messages, plain)
    has_more = any(MARKER.search(m["content"]) for m in mended_messages)
    if has_more or (policy.markers is Fault.leave_out and mended_messages is not messages):
        raise Refused("marker of an empty slot")
    if mended_messages is not messages:
        mended("marker of an empty slot taken out")
    return in_order(mended_messages)


PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_]+\s*\}\}|\{\s*(?:name|author|model_name|bot_name)\s*\}|<(?:NAME|AUTHOR)>")
TEMPLATES = re.compile(
    r"template|jinja|mustache|handlebars|vue|angular|django|flask|ansible|helm|liquid|latex|f-string|format\(|```|模板|插值|占位",
    re.IGNORECASE,
)


def placeholders(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    """{{name}} in an answer, where nobody speaks of templates."""
    if policy.placeholders is Fault.keep or not any(PLACEHOLDER.search(a) for a in said_by(messages, "assistant")):
        return messages
    if any(TEMPLATES.search(m["content"]) for m in messages):
        return messages
    raise Refused("placeholder that nobody filled in")


# ---- who the model says to be

# A Latin name stands alone: Meta is not in metaphor. A Chinese one has no blanks around it.
ALONE = r"(?:(?<![A-Za-z0-9])|(?=[^A-Za-z0-9]))(?:{})(?:(?![A-Za-z])|(?<=[^A-Za-z0-9]))"
NAMES = ALONE.format(
    r"ChatGPT|GPT-?[345](?:\.5)?(?:-turbo)?|Claude|Bard|Gemini|Copilot|Bing Chat|LLaMA|Llama|Alpaca|Vicuna|Qwen"
    r"|DeepSeek|ChatGLM|Mistral|Grok|文心一言|通义千问|讯飞星火|豆包|Kimi"
)
MAKERS = ALONE.format(
    r"OpenAI|Anthropic|Google(?: DeepMind| AI)?|DeepMind|Meta(?: AI)?|Microsoft|Mistral AI|Alibaba(?: Cloud)?"
    r"|xAI|LMSYS|百度|阿里(?:巴巴|云)?|腾讯|字节跳动|微软|谷歌|清华(?:大学)?|智谱(?:AI)?|科大讯飞|深度求索"
)
# A part of each, in lower case: most texts hold none, and looking for these takes a tenth of the time.
HINTS = (
    "gpt claude bard gemini copilot bing llama alpaca vicuna qwen deepseek chatglm mistral grok kimi openai anthropic "
    "google deepmind meta microsoft alibaba xai lmsys 文心 通义 星火 豆包 百度 阿里 腾讯 字节 微软 谷歌 清华 智谱 讯飞 "
    "深度求索"
).split()
MADE = r"(?:created|developed|trained|made|built|designed|programmed)"
MADE_ZH = r"(?:开发|训练|创建|创造|研发|设计|推出|打造|构建|制作|建立|提供)"
# The speaker speaks of itself: "ChatGPT was developed by OpenAI" is a fact, "I was developed by OpenAI" is a claim.
SELF = re.compile(
    rf"\b(?:I am|I'm|I’m|my name is|call me|this is)\s+(?:a |an |the |called |named )*(?:\w+[ ,-]+){{0,6}}?"
    rf"{NAMES}\b"
    rf"|\bas {NAMES}, I\b"
    rf"|\b(?:I am|I'm|I’m|I was|as an? (?:AI|artificial|large|language)\b|my (?:creators?|developers?|makers?)\b)"
    rf"(?:(?!\bnot\b)[^.!?\n]){{0,80}}?\b(?:by|at|from|is|are|was)\s+{MAKERS}\b"
    rf"|\b{MAKERS}\s+(?:{MADE})\s+me\b"
    rf"|(?:我是|我叫|我的名字(?:是|叫)|我被称为|我来自)(?:[^。！？\n，,“”\"]{{0,16}}?){NAMES}"
    rf"|作为(?:一[个款种名位])?{NAMES}[，,]"
    rf"|(?:我是|我被|我由|我来自|作为(?:一[个款种名位]|由))[^。！？\n]{{0,24}}?{MAKERS}[^。！？\n]{{0,8}}?(?:{MADE_ZH}|的)"
    rf"|{MAKERS}(?:公司)?(?:{MADE_ZH})(?:了我|的我|出我)",
    re.IGNORECASE,
)


END = re.compile(r"[!?。！？\n]|\.(?=\s|$)|$")  # of a sentence; the point of GPT-3.5 is none


def identity(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    """Answers in which the model says to be another one, or made by others.

    Mended, the names that it gives itself and its maker in those sentences go, wherever they stand in the answer; what
    else it speaks of stays: other makers, and metaphors.
    """
    if policy.identity is Fault.keep or not any(map(says_to_be_another, said_by(messages, "assistant"))):
        return messages
    if policy.identity is Fault.leave_out:
        raise Refused("says to be another's model")
    mended("another's name and maker replaced")
    put_in = ((NAMES, policy.identity_name), (MAKERS, policy.identity_maker))

    def renamed(content: str, role: str) -> str:
        if role != "assistant" or not says_to_be_another(content):
            return content
        claims = [content[found.start() : END.search(content, found.end()).start()] for found in SELF.finditer(content)]
        for kind, ours in put_in:
            said = {found[0] for claim in claims for found in re.finditer(kind, claim, re.IGNORECASE)}
            if said:  # the longest first: GPT-3.5 before GPT-3
                theirs = ALONE.format("|".join(map(re.escape, sorted(said, key=len, reverse=True))))
                content = re.sub(theirs, lambda _, ours=ours: ours, content)
        return content

    return changed(messages, renamed)


def says_to_be_another(answer: str) -> bool:
    lower = answer.lower()
    return any(hint in lower for hint in HINTS) and SELF.search(answer) is not None


DISCLAIMER = re.compile(
    r"\bas an? (?:AI|artificial intelligence)\b|\bas a (?:large )?language model\b"
    r"|作为(?:一[个款种名位])?(?:人工智能|AI|语言模型)",
    re.IGNORECASE,
)


def disclaimers(messages: Messages, record: dict, policy: ConversationPolicy, mended: Mended) -> Messages:
    if policy.disclaimers is Fault.leave_out and any(DISCLAIMER.search(a) for a in said_by(messages, "assistant")):
        raise Refused("disclaimer of an AI")
    return messages


RULES: tuple[Rule, ...] = (
    system_tags,
    tools,
    last_turn,
    order,
    control_characters,
    order,  # a turn of zero width spaces alone is empty now
    html_remnants,
    markers,
    placeholders,
    identity,
    disclaimers,
)


# ---- language

ENGLISH = re.compile(r"\b(?:the|of|and|is|to|for|that|with|are|what|how|you|your|this|from|which|does|can|was)\b", re.I)
WORD = re.compile(r"[^\W\d_]{2,}")
SAMPLE = 600  # characters that the library reads
CERTAIN = 0.9  # English with French names in it comes out below


def language_of(text: str, detector: Detector) -> str:
    """zh, en or other. By script alone French is English; the library tells them apart where English's most frequent
    words are rare, which most English never is."""
    language = conversations.language(text)
    if language != "en" or detector is Detector.script:
        return language
    sample = text[:SAMPLE]
    words = WORD.findall(sample)
    if len(words) < 4 or len(ENGLISH.findall(sample)) > 0.15 * len(words):
        return "en"
    name, probability = identifier().classify(sample)
    return "other" if name != "en" and probability > CERTAIN else "en"


@functools.cache
def identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
