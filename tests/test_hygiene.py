"""The rules for conversations, each by itself: what it mends, what it leaves out, and what it must not touch."""

import dataclasses
import json

import pytest

import train
from aquila_sft.config.data import ConversationPolicy, Detector, Fault
from aquila_sft.data import conversations, hygiene
from aquila_sft.errors import UserError


@pytest.fixture(scope="module")
def defaults() -> ConversationPolicy:
    run = train.compose_run(["recipe=sft", "scale=135m", "data.files=a.jsonl"])
    return run.data.clean


def said(*turns: tuple[str, str] | str) -> dict:
    """Turns by role, or question, answer, question, …"""
    roles = ("human", "gpt")
    listed = [turn if isinstance(turn, tuple) else (roles[i % 2], turn) for i, turn in enumerate(turns)]
    return {"conversations": [{"from": role, "value": value} for role, value in listed]}


def verdict(record: dict, policy: ConversationPolicy, **changes) -> hygiene.Verdict:
    return hygiene.judge(record, "file", dataclasses.replace(policy, **changes))


def contents(found: hygiene.Verdict) -> list[str]:
    assert found.reason is None, found.reason
    return [m["content"] for m in found.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Add.\n1 and 2", "input": "", "output": "3", "system": "", "history": []},
        {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "open_qa"},
        {"prompt": "Add.\n1 and 2", "completion": "3"},
        {"question": "Add.", "context": "1 and 2", "answer": "3"},
        {"prompt": "Add.\n1 and 2", "input": "1 and 2", "completion": "3"},
        {"question": "Add.\n1 and 2", "answer": "3"},
        {"conversations": [{"from": "human", "value": "Add.\n1 and 2"}, {"from": "gpt", "value": "3"}], "system": ""},
        {"messages": [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}]},
    ],
)
def test_the_common_shapes_say_the_same(record):
    wanted = [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}]
    assert conversations.normalise(record, "f").messages == wanted


def test_history_and_system_line_of_an_alpaca_record_come_first():
    record = {"instruction": "And 2?", "output": "4", "history": [["Double 1.", "2"]], "system": "Be brief."}
    messages = conversations.normalise(record, "f").messages
    assert [m["content"] for m in messages] == ["Be brief.", "Double 1.", "2", "And 2?", "4"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": None, "input": None, "output": None, "prompt": "q", "response": "a"},
        {"instruction": "", "input": " ", "prompt": "q", "output": None, "response": "a", "messages": None},
        {"prompt": "", "question": "q", "output": [], "answer": "a"},
        {"instruction": None, "input": "q", "context": None, "output": "a"},
        {"conversations": [], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [], "messages": "", "prompt": "q", "response": "a"},
        {"conversations": [{"from": "human", "value": None, "content": "q"}, {"role": "Assistant ", "content": "a"}]},
        {"messages": [{"role": " user", "value": "", "content": "q"}, {"role": "model", "value": "a"}]},
    ],
)
def test_empty_slots_of_another_shape_do_not_hide_one_that_is_complete(record):
    assert [m["content"] for m in conversations.normalise(record, "f").messages] == ["q", "a"]


@pytest.mark.parametrize(
    "record, why",
    [
        ({"messages": []}, "no turns"),
        ({"messages": None, "conversations": None}, "none of the shapes of a conversation"),
        ({"prompt": "q", "output": None}, "empty turn"),
        ({"instruction": None, "input": "", "output": "a"}, "empty turn"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": {"value": "q"}}]}]}, "not text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}, {"text": 5}]}]}, "not text"),
    ],
)
def test_what_holds_no_conversation_or_no_text_is_refused_with_the_reason(record, why):
    with pytest.raises(conversations.Refused, match=why):
        conversations.normalise(record, "f")


def test_the_name_of_a_source_is_one_that_a_terminal_and_a_file_can_hold():
    assert conversations.source_of({"source": "a\ud800\x1b[31m\n维基 x"}, "f") == "a\\ud800\\x1b[31m\\n维基 x"
    assert conversations.source_of({"source": ""}, "f\t") == "f\\t"


def test_a_record_nested_deeply_is_one_record_that_is_left_out(defaults):
    deep = "x"
    for level in range(5000):
        deep = [deep] if level % 2 else {"a": deep}
    assert verdict({"a": deep}, defaults).reason == "none of the shapes of a conversation"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": deep}]
    assert verdict({"messages": turns}, defaults).reason == "nested too deeply"
    assert conversations.any_text([{"a": "b", "role": "user"}, [], ["c", 1, {"d": "e"}]]) == "b  c  e"


@pytest.mark.parametrize("weight", ["1", 1.0, None])
def test_a_weight_of_one_is_one_however_it_is_written(weight):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": weight}]
    assert len(conversations.normalise({"messages": turns}, "f").messages) == 2
    with pytest.raises(conversations.Refused, match="weight in the loss is 0"):
        conversations.normalise({"messages": [turns[0], turns[1] | {"loss_weight": None, "weight": 0}]}, "f")


@pytest.mark.parametrize("key", ["loss_weight", "weight"])
def test_an_answer_that_its_record_does_not_want_learnt_is_not_learnt_in_silence(key):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: 0.0}]
    with pytest.raises(conversations.Refused, match="weight in the loss is 0.0"):
        conversations.normalise({"messages": turns}, "f")
    turns = [{"role": "user", "content": "a", key: 0.0}, {"role": "assistant", "content": "b", key: 1.0}]
    assert len(conversations.normalise({"messages": turns}, "f").messages) == 2


def test_an_instruction_tagged_as_an_answer_becomes_the_system_line(defaults):
    record = said(("gpt", "You are an assistant. Answer in one word."), ("human", "2 + 2?"), ("gpt", "Four"))
    found = verdict(record, defaults)
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant"]
    assert found.mended == ["system line tagged as an answer"]
    assert verdict(record, defaults, system_tags=Fault.leave_out).reason == "system line tagged as an answer"
    assert verdict(record, defaults, system_tags=Fault.keep).reason == "begins with an answer"


@pytest.mark.parametrize("greeting", ["Hello! How can I help you?", "你好，有什么可以帮您？", ""])
def test_a_greeting_before_the_first_question_is_no_system_line(defaults, greeting):
    found = verdict(said(("gpt", greeting), ("human", "2 + 2?"), ("gpt", "4")), defaults)
    assert contents(found) == ["2 + 2?", "4"] and found.mended == ["answer before the first question cut"]


def test_what_is_neither_instruction_nor_greeting_is_left_out(defaults):
    assert verdict(said(("gpt", "Paris."), ("human", "Why?"), ("gpt", "b")), defaults).reason == "begins with an answer"


TOOLS = said(
    ("human", "Weather?"), ("function_call", '{"city": "Xi\'an"}'), ("observation", '{"sky": "blue"}'), ("gpt", "Blue.")
) | {"tools": '[{"name": "weather"}]'}


def test_turns_of_tools_are_left_out_or_become_answers_and_questions(defaults):
    assert verdict(TOOLS, defaults).reason == "turns of tools"
    found = verdict(TOOLS, defaults, tools=Fault.mend)
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert found.messages[0]["content"] == TOOLS["tools"]


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_what_is_said_beside_a_call_stays_before_it(defaults, key):
    turns = [("user", "Weather?", None), ("assistant", "I look.", [{"f": "晴"}]), ("tool", "sun", None)]
    turns = [{"role": role, "content": content, key: calls} for role, content, calls in turns]
    record = {"messages": [*turns, {"role": "assistant", "content": "Sunny."}]}
    found = contents(verdict(record, defaults, tools=Fault.mend))
    assert found == ["Weather?", 'I look.\n[{"f": "晴"}]', "sun", "Sunny."]
    turns[1]["content"] = None
    assert contents(verdict(record, defaults, tools=Fault.mend))[1] == '[{"f": "晴"}]'


def test_a_question_that_nobody_answers_is_cut(defaults):
    found = verdict(said("a?", "b", "c?"), defaults)
    assert contents(found) == ["a?", "b"] and found.mended == ["last question, without an answer, cut"]
    assert verdict(said("a?", "b", "c?"), defaults, last_turn=Fault.leave_out).reason == "ends without an answer"


def test_control_characters_go_and_joiners_stay(defaults):
    found = verdict(said("a\u200bb\x07\r\nc", "👩\u200d💻\u0085ok\tand\ufeff"), defaults)
    assert contents(found) == ["ab\nc", "👩\u200d💻\nok\tand"] and len(found.mended) == 1
    assert verdict(said("a\x07", "b"), defaults, control_characters=Fault.leave_out).reason == "control characters"
    assert contents(verdict(said("a\x07", "b"), defaults, control_characters=Fault.keep)) == ["a\x07", "b"]


def test_a_turn_of_control_characters_alone_is_an_empty_turn(defaults):
    for changes in ({}, {"markers": Fault.keep, "html": Fault.keep}):
        assert verdict(said("a?", "\u200b"), defaults, **changes).reason == "empty turn"


def test_text_that_a_decoder_broke_cannot_be_mended(defaults):
    assert verdict(said("what is \ufffd\ufffd?", "b"), defaults).reason == "text that was decoded wrongly"


@pytest.mark.parametrize(
    "record, wanted",
    [
        (said("找到同义词：&#39;Tenacious&#39;。", "如果 a &lt; b"), ["找到同义词：'Tenacious'。", "如果 a < b"]),
        (said("Who?", "Tom &amp; Ann.<br>Both<br/>of <b>them</b>."), ["Who?", "Tom & Ann.\nBoth\nof them."]),
        (said("Is a <b and c> d?", "No."), None),
        (said("How is < written in HTML?", "As &lt;."), None),
        (said("Make a list of two.", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>"), None),
        (said("Write a link.", 'Like this: `<a href="x">x</a>`, <b>not</b> &lt;a&gt;'), None),
    ],
)
def test_remnants_of_a_page_go_where_nobody_speaks_of_markup(defaults, record, wanted):
    found = verdict(record, defaults)
    if wanted is None:
        assert contents(found) == [t["value"] for t in record["conversations"]] and not found.mended
    else:
        assert contents(found) == wanted and found.mended == ["remnants of HTML taken out"]
        assert verdict(record, defaults, html=Fault.leave_out).reason == "remnants of HTML"


@pytest.mark.parametrize(
    "marker", ["<noinput>", '"<noinput>"', "<No input>", "无输入", "&lt;无输入&gt;", "`<no input>` 8"]
)
def test_the_marker_of_an_empty_slot_goes_out_of_a_question(defaults, marker):
    assert contents(verdict(said(f"Name a bird.\n{marker}", "Owl."), defaults)) == ["Name a bird.", "Owl."]


def test_an_answer_that_is_the_marker_of_an_empty_slot_is_no_answer(defaults):
    for answer in ("<nooutput> This cannot be done.", "<noinput>", "&lt;无输出&gt;"):
        assert verdict(said("Draw a house.", answer), defaults).reason == "marker of an empty slot"


def test_a_placeholder_that_nobody_filled_in_is_left_out_and_a_template_is_not(defaults):
    assert verdict(said("Who are you?", "I am {{name}}."), defaults).reason == "placeholder that nobody filled in"
    kept = said("Write a Jinja template.", "Hello {{ name }}!"), said("Vue?", "<p>{{ text }}</p>"), said("{{a}}?", "b")
    for record in kept:
        assert verdict(record, defaults).reason is None


LEAKS = [
    "I'm ChatGPT, a large language model trained by OpenAI.",
    "As an AI language model created by OpenAI, I cannot smoke.",
    "I was developed by Anthropic to help.",
    "My name is Claude.",
    "OpenAI trained me on text.",
    "我是由OpenAI训练的大型语言模型。",
    "作为一款由OpenAI开发的语言模型，我没有感情。",
    "我叫通义千问，是阿里云研发的。",
    "作为ChatGPT，我不能上网。",
    "我是文心一言。",
]
NO_LEAKS = [
    "ChatGPT was developed by OpenAI and released in 2022.",
    "OpenAI训练了GPT-4。",
    "I am a doctor at a clinic, not at Google.",
    "As an AI language model, I have no preferences.",
    "Large models such as GPT-3 can generate text.",
    "我是一个语言模型。",
    "他是百度的工程师。",
    "I am an assistant developed by a small team.",
]


@pytest.mark.parametrize("answer", LEAKS)
def test_an_answer_that_says_to_be_anothers_model_is_left_out(defaults, answer):
    assert verdict(said("Who are you?", answer), defaults).reason == "says to be another's model"
    assert verdict(said(answer, "Is that so?"), defaults).reason is None, "a person may say so"
    assert verdict(said("Who are you?", answer), defaults, identity=Fault.keep).reason is None


@pytest.mark.parametrize("answer", NO_LEAKS)
def test_what_is_said_of_others_models_stays(defaults, answer):
    assert verdict(said("Tell me.", answer), defaults).reason is None


def test_names_can_be_replaced(defaults):
    own = {"identity": Fault.mend, "identity_name": "Aquila", "identity_maker": "BAAI"}
    record = said("ChatGPT?", "I am ChatGPT, trained by OpenAI.", "And it?", "GPT-4 is OpenAI's.")
    found = verdict(record, defaults, **own)
    assert contents(found) == ["ChatGPT?", "I am Aquila, trained by BAAI.", "And it?", "GPT-4 is OpenAI's."]
    assert found.mended == ["another's name and maker replaced"]


def test_only_what_the_model_says_of_itself_is_renamed_and_no_part_of_a_word(defaults):
    own = {"identity": Fault.mend, "identity_name": "A\\1q", "identity_maker": "BAAI"}
    answer = (
        "I am ChatGPT, based on GPT-3.5, made by Meta. A metaphor is metadata; a bombardment by bards of Metallica. "
        "ChatGPT is not made by Google, just google it. ChatGPTs? META."
    )
    assert contents(verdict(said("You?", answer), defaults, **own))[1] == (
        "I am A\\1q, based on A\\1q, made by BAAI. A metaphor is metadata; a bombardment by bards of Metallica. "
        "A\\1q is not made by Google, just google it. ChatGPTs? META."
    )
    answer = "我是ChatGPT，由OpenAI训练。百度是一家公司，ChatGPT不是它的。"
    wanted = "我是A\\1q，由BAAI训练。百度是一家公司，A\\1q不是它的。"
    assert contents(verdict(said("你是谁？", answer), defaults, **own))[1] == wanted
    assert verdict(said("Who?", "我是bombardment的学生"), defaults, **own).mended == []


def test_a_disclaimer_stays_unless_one_says_otherwise(defaults):
    record = said("Do you like it?", "As an AI language model, I do not.")
    assert verdict(record, defaults).reason is None
    assert verdict(record, defaults, disclaimers=Fault.leave_out).reason == "disclaimer of an AI"


@pytest.mark.parametrize(
    "text, language",
    [
        ("Quelle est la capitale de la France ? Paris est la capitale.", "other"),
        ("¿Cómo puedo mejorar mi español? Practica todos los días.", "other"),
        ("Was ist die Hauptstadt von Deutschland? Berlin ist die Hauptstadt.", "other"),
        ("How does a lemon taste? A lemon tastes sour.", "en"),
        ("Name five famous composers: Johann Sebastian Bach, Antonio Vivaldi, Henry Purcell", "en"),
        ("def area(width, height): return width * height", "en"),
        ("为什么天空是蓝色的？", "zh"),
        ("6 + 3 = ? 6 + 3 = 9.", "other"),
    ],
)
def test_a_library_tells_english_from_what_only_looks_like_it(text, language):
    assert hygiene.language_of(text, Detector.library) == language


def test_by_script_alone_french_is_english():
    assert hygiene.language_of("Quelle est la capitale de la France ?", Detector.script) == "en"


def test_languages_that_were_not_asked_for_are_left_out_by_name(defaults):
    record = said("Quelle est la capitale de la France ?", "Paris est la capitale.")
    found = verdict(record, defaults, languages=["zh", "en"])
    assert found.reason == "language: other" and found.language == "other"


def test_the_field_langdetect_is_never_believed(defaults):
    assert verdict(said("我喜欢吃苹果", "好的。") | {"langdetect": "ko"}, defaults).language == "zh"


def test_what_is_left_out_keeps_the_messages_that_it_had(defaults):
    found = verdict(said("Hi", "I am ChatGPT.") | {"source": "s"}, defaults)
    assert len(found.messages) == 2 and (found.language, found.source) == ("en", "s")


@pytest.mark.parametrize(
    "setting, said_of_it",
    [
        ("data.clean.tools=keep", "cannot be done; use one of mend, leave_out"),
        ("data.clean.identity=mend", "data.clean.identity_name="),
        ("data.clean.languages=[fr]", "known are zh, en and other"),
        ("data.clean.html=yes", "keep, mend, leave_out"),
        ("data.clean.near_duplicates=0.2", "outside 0.6"),
        ("data.clean.htlm=keep", "did you mean data.clean.html"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_at_the_door(capsys, setting, said_of_it):
    assert train.main(["recipe=sft", "scale=135m", "data.files=a.jsonl", setting]) == 2
    error = capsys.readouterr().err
    assert said_of_it in error and error.count("\n") == 1


def test_a_verdict_is_the_same_again(defaults):
    """The second look at a record, when it is tokenized, must say what the first one said."""
    records = [said("a\u200b", "b &amp; c"), said("a", "I am ChatGPT."), TOOLS, {"x": 1}, said("a?", "b", "c?")]
    for record in records:
        before = json.dumps(record)
        assert verdict(record, defaults) == verdict(record, defaults)
        assert json.dumps(record) == before, "a rule changed the record"


def test_rules_raise_nothing_but_refusals(defaults):
    for value in (None, [], "", 5, [5], [None], {"from": None}, [{"from": "gpt"}], [{"from": "human", "value": None}]):
        for key in ("conversations", "messages", "instruction", "prompt"):
            found = hygiene.judge({key: value, "output": value}, "f", defaults)
            assert found.reason, (key, value)


def test_unknown_words_of_the_typed_door_are_errors():
    with pytest.raises(UserError):
        train.compose_run(["recipe=sft", "scale=135m", "data.files=a.jsonl", "data.clean.too_long=keep"])
