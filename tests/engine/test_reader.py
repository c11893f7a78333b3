"""Answers read as messages: the same events however the text is cut, and nothing of it lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.answers import ANSWERS, THINK, agree, any_cut_gives_the_same_events, read
from warmkv_server.contract.calls import CallStarted, CallStatus
from warmkv_server.contract.content import ToolCall
from warmkv_server.text.formats import BY_NAME
from warmkv_server.text.syntax import syntax_of

CUTS = 300
"""Of each format; 10,000 of them are tried with the long tests."""


def test_every_format_has_an_answer_here() -> None:
    assert set(ANSWERS) == set(BY_NAME)


@pytest.mark.parametrize("form", ANSWERS)
def test_any_cut_gives_the_same_events(form: str) -> None:
    any_cut_gives_the_same_events(form, CUTS)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_garbage_is_read_the_same_however_it_is_cut(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(sorted(BY_NAME)))
    marks = [*BY_NAME[form].marks, BY_NAME[form].end, BY_NAME[form].opens, *THINK]
    words = st.sampled_from(
        [*filter(None, marks), '{"name": "f", ', '"arguments": {', '"a": 1', "}", "]", "[", ",", ";"]
    )
    text = "".join(data.draw(st.lists(words | st.text(' \n{}"\\:a', max_size=3), max_size=12)))
    agree(form, text, data.draw(st.lists(st.integers(0, 500), max_size=10)), thinks=data.draw(st.booleans()))


def test_what_each_is() -> None:
    text, reasoning, _, calls = read("json_tools", [ANSWERS["json_tools"][0]])
    assert (text, reasoning) == ("Let me see.", 'Hm {"a": 1}')
    assert [(c.call.name, c.call.arguments) for c in calls] == [
        ("f", '{"x": "</tool_call>\\"", "n": 9007199254740993}'),
        ("g", '{"y": [1, {"z": null}]}'),
    ]
    text, _, _, calls = read("json_tools", [ANSWERS["json_tools"][1]])
    assert text == "Hi and more <tool_"
    assert [call.status for call in calls] == [CallStatus.VALID, CallStatus.MALFORMED]
    assert calls[1].raw == "}\n</tool_call>"
    text, _, _, calls = read("llama3_json", [ANSWERS["llama3_json"][1]])
    assert (text, calls) == (ANSWERS["llama3_json"][1], [])
    _, _, news, calls = read("mistral", ANSWERS["mistral"])
    assert news[0] == CallStarted(0, "call00000", "f")  # before its own id comes
    assert calls[0].written == "abcdefghi"
    text, _, _, calls = read("gpt_oss", ANSWERS["gpt_oss"])
    assert (text, calls[0].call.name, calls[0].call.arguments) == ("Wait.", "f", '{"x": 1}')


def calls_of(form: str, number: int = 0) -> list[tuple[str, str, str, CallStatus]]:
    return [(c.written, c.call.name, c.call.arguments, c.status) for c in read(form, list(ANSWERS[form][number]))[3]]


def test_formats_of_our_own() -> None:
    valid, malformed = CallStatus.VALID, CallStatus.MALFORMED
    assert calls_of("apertus") == [("", "f", '{"x": "<|tools_suffix|>"}', valid), ("", "g", "{}", valid)]
    assert [status for *_, status in calls_of("apertus", 1)] == [malformed, malformed]  # two names, and no arguments
    assert calls_of("solar")[0] == ("abc", "f", '{"x": "<|tool_call:end|>"}', valid)
    assert calls_of("dsml") == [("", "f", '{"x": "\\"a\\"", "y": [1, 2.50]}', valid), ("", "g", "{}", valid)]
    assert [status for *_, status in calls_of("dsml_v4")] == [malformed]  # neither text nor JSON


def test_functionary_says_to_whom_it_speaks() -> None:
    """Behind what the prompt has begun; where it doesn't go on with that, it is a text."""
    text, _, _, calls = read("functionary_v3_2", [ANSWERS["functionary_v3_2"][0]])
    assert (text, [(c.call.name, c.call.arguments) for c in calls]) == (
        "Let me see.",
        [("f", '{"x": ">>>g\\n{}"}'), ("g", "{}")],
    )
    text, _, _, calls = read("functionary_v3_2", [ANSWERS["functionary_v3_2"][1]])
    assert (text, [c.call.name for c in calls]) == ("So:\n>>> print(f)\n1 >>>h\n[2]", ["f"])
    for said in ANSWERS["functionary_v3_2"][2], "Hello", "f", "f\n":
        assert read("functionary_v3_2", [said])[::3] == (said, [])


def test_calls_that_begin_as_texts_do_are_not_forced() -> None:
    call = ToolCall("a", "f", '{"x": 1}')
    assert syntax_of(BY_NAME["functionary_v3_2"], [call, call], 'f\n{"x": 1}', "", "") is None


@pytest.mark.parametrize("end", [12, 30, 45])
def test_an_answer_that_ends_inside_a_call(end: int) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"x": [1, 2, 3]}}\n</tool_call>'
    _, _, _, calls = read("json_tools", [text[:end]])
    assert [call.status for call in calls] == [CallStatus.INCOMPLETE]
