"""Answers read as messages: the same events however the text is cut, and nothing of it lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmkv_server.contract.calls import CallArguments, CallFinished, CallNews, CallStarted, CallStatus
from warmkv_server.text.formats import BY_NAME
from warmkv_server.text.reader import MessageReader

THINK = ("<think>", "</think>")
ANSWERS = {
    "json_tools": [
        '<think>\nHm {"a": 1}\n</think>\n\nLet me see.\n<tool_call>\n{"name": "f", '
        '"arguments": {"x": "</tool_call>\\"", "n": 9007199254740993}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"y": [1, {"z": null}]}, "name": "g"}\n'
        "</tool_call>",
        'Hi <tool_call>\n{"name": "f", "arguments": {"x": 1}}}\n</tool_call> and more <tool_',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call><tool_call>garbage</tool_call>',
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1.50}}]</tool_call>',
    ],
    "llama3_json": [
        '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
        ' {"name": "Ann", "age": 3} is what you asked for',
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"x": {"y": "}"}}}',
    ],
    "mistral": [
        'Well.[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]'
    ],
    "mistral_args": ['[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": {"b": 1}}[TOOL_CALLS]g[ARGS]{}'],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"x": "```"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"x": 1}<|tool_call_end|><|tool_calls_section_end|>'
    ],
    "gpt_oss": [
        "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary to=functions.f json"
        '<|message|>{"x": 1}'
    ],
    "qwen3_coder": ["So <tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call> then"],
}


def read(
    form: str, pieces: Sequence[str], *, thinks: bool = False
) -> tuple[str, str, list[CallNews], list[CallFinished]]:
    """Text, reasoning, and news of calls, with pieces of arguments joined."""
    reader = MessageReader(THINK, BY_NAME[form], lambda number: f"call{number:05}", thinks=thinks)
    text = reasoning = ""
    news: list[CallNews] = []
    for told in [*map(reader.push, pieces), reader.finish()]:
        text += told.text
        reasoning += told.reasoning
        for each in told.calls:
            last = news[-1] if news else None
            if isinstance(each, CallArguments) and isinstance(last, CallArguments) and last.index == each.index:
                news[-1] = CallArguments(each.index, last.text + each.text)
            else:
                news.append(each)
    return text, reasoning, news, reader.finished


def cut(text: str, at: Sequence[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[a:b] for a, b in pairwise(places)]


def agree(form: str, text: str, places: Sequence[int], *, thinks: bool = False) -> None:
    whole = read(form, [text], thinks=thinks)
    assert read(form, cut(text, places), thinks=thinks) == whole
    _, _, news, finished = whole
    for call in finished:
        said = "".join(each.text for each in news if isinstance(each, CallArguments) and each.index == call.index)
        assert said == call.call.arguments
        assert [each.id for each in news if isinstance(each, CallStarted) and each.index == call.index] == [
            call.call.id
        ]


@pytest.mark.parametrize("form", ANSWERS)
@settings(max_examples=200, deadline=None)
@given(places=st.lists(st.integers(0, 1000), max_size=20), end=st.integers(0, 1000))
def test_any_cut_gives_the_same_events(form: str, places: list[int], end: int) -> None:
    for text in ANSWERS[form]:
        agree(form, text, places)
        agree(form, text[: end % (len(text) + 1)], places)  # an answer that ends in the middle
        agree(form, text, range(len(text)))


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


@pytest.mark.parametrize("end", [12, 30, 45])
def test_an_answer_that_ends_inside_a_call(end: int) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"x": [1, 2, 3]}}\n</tool_call>'
    _, _, _, calls = read("json_tools", [text[:end]])
    assert [call.status for call in calls] == [CallStatus.INCOMPLETE]
