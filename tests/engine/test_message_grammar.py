"""Answers that are held to a shape: what a grammar lets through is read as it was meant, whichever way it goes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest

from tests.engine.tokenizers import variant
from warmkv_server.contract.calls import CallFinished, CallStatus
from warmkv_server.contract.content import Tool, ToolCall
from warmkv_server.contract.grammar import ID, Calls, CallSyntax, Grammar, GrammarKind, Message, Thought
from warmkv_server.engine.output.answer_text import Spelling
from warmkv_server.engine.output.constraint import Constraint, RanOut, Vocabulary
from warmkv_server.text.formats import BY_NAME
from warmkv_server.text.reader import MessageReader
from warmkv_server.text.schemas import satisfies, strict_grammar
from warmkv_server.text.syntax import syntax_of

END = 1
THINK = ("<think>", "</think>")
CALLED = (ToolCall("id1234567", "first", '{"place": "Uri"}'), ToolCall("id7654321", "other", '{"count": 3}'))
PLACE = '{"properties": {"place": {"enum": ["Uri", "Zug"]}}, "required": ["place"], "additionalProperties": false}'
TOOLS = (Tool("weather", "", PLACE, strict=True), Tool("clock", "", "", strict=True))


class Written(NamedTuple):
    """What a template writes of one call, and of two."""

    one: str
    both: str


FORMATS = {
    "json_tools": Written(
        '</think>\n\n<tool_call>\n{"name": "first", "arguments": {"place": "Uri"}}\n</tool_call>',
        '</think>\n\n<tool_call>\n{"name": "first", "arguments": {"place": "Uri"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "other", "arguments": {"count": 3}}\n</tool_call>',
    ),
    "mistral": Written(
        '[TOOL_CALLS][{"name": "first", "arguments": {"place": "Uri"}, "id": "id1234567"}]',
        '[TOOL_CALLS][{"name": "first", "arguments": {"place": "Uri"}, "id": "id1234567"}, '
        '{"name": "other", "arguments": {"count": 3}, "id": "id7654321"}]',
    ),
    "mistral_args": Written(
        '[TOOL_CALLS]first[CALL_ID]id1234567[ARGS]{"place": "Uri"}',
        '[TOOL_CALLS]first[CALL_ID]id1234567[ARGS]{"place": "Uri"}'
        '[TOOL_CALLS]other[CALL_ID]id7654321[ARGS]{"count": 3}',
    ),
    "kimi_k2": Written(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.first:0<|tool_call_argument_begin|>"
        '{"place": "Uri"}<|tool_call_end|><|tool_calls_section_end|>',
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.first:0<|tool_call_argument_begin|>"
        '{"place": "Uri"}<|tool_call_end|><|tool_call_begin|>functions.other:1<|tool_call_argument_begin|>'
        '{"count": 3}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "gpt_oss": Written(' to=functions.first<|channel|>commentary json<|message|>{"place": "Uri"}', ""),
    "glm47": Written(
        "</think><tool_call>first<arg_key>place</arg_key><arg_value>Uri</arg_value></tool_call>",
        "</think><tool_call>first<arg_key>place</arg_key><arg_value>Uri</arg_value></tool_call>"
        "<tool_call>other<arg_key>count</arg_key><arg_value>3</arg_value></tool_call>",
    ),
    "llama3_json": Written('{"name": "first", "parameters": {"place": "Uri"}}', ""),
    "qwen3_coder": Written(
        "<tool_call>\n<function=first>\n<parameter=place>\nUri\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=first>\n<parameter=place>\nUri\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=other>\n<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>",
    ),
}
MARKS = (
    *THINK,
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|channel|>", "<|message|>"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    "<|tool_calls_section_end|>",
)


class Vocab(NamedTuple):
    known: Vocabulary
    spelling: Spelling


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def vocab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    """Of a tokenizer whose marks are tokens of their own, or are not."""
    tokenizer = variant(tmp_path_factory.mktemp("tokenizer"), special=MARKS if request.param else ())
    spelling = Spelling(tokenizer)
    return Vocab(Vocabulary(tokenizer, spelling, len(tokenizer.get_vocab()), {END}), spelling)


def syntax(name: str) -> CallSyntax:
    found = syntax_of(BY_NAME[name], CALLED, *FORMATS[name], thought=THINK[1])
    assert found is not None
    return found


def message(name: str, *, speaks: bool, most: int = 0, text: Grammar | None = None) -> Message:
    form, how = BY_NAME[name], syntax(name)
    marks = [mark for mark in (*form.begins, *form.around) if how.opens.startswith(mark)]
    tools = tuple((tool.name, None if how.unread else strict_grammar(tool, n)) for n, tool in enumerate(TOOLS))
    calls = Calls(how, tools, most, marks[0] if marks else "")
    return Message(Thought(*THINK), calls, speaks, text, (*form.begins, *marks[:1]), bare=not form.begins)


def begin(held: Message, vocab: Vocab) -> Constraint:
    return compiled(held, vocab).copy()


@lru_cache
def compiled(held: Message, vocab: Vocab) -> Constraint:
    return Constraint.compile(Grammar(GrammarKind.MESSAGE, place="tool_choice", message=held), vocab.known)


def wander(held: Message, vocab: Vocab, seed: int) -> str | None:
    """An answer that goes where it may, towards its end where it can; None if it doesn't come to it."""
    draw = random.Random(seed)
    constraint = begin(held, vocab)
    tokens: list[int] = []
    while len(tokens) < 100:
        mask = constraint.mask()
        assert mask is not None
        may = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        if END in may and (draw.random() < 0.4 or may == [END]):
            return vocab.spelling.text(tokens)
        marks = [token for token in may if vocab.known.tokens.is_special_token(token) and token != END]
        token = draw.choice(marks if marks and draw.random() < 0.2 else [each for each in may if each != END])
        constraint.take([token])
        tokens.append(token)
    return None


def read(name: str, text: str) -> tuple[str, list[CallFinished]]:
    reader = MessageReader(THINK, BY_NAME[name], str, tools=TOOLS)
    return reader.push(text).text + reader.finish().text, reader.finished


def takes(held: Message, vocab: Vocab, text: str) -> bool:
    """Whether the text may be an answer."""
    constraint = begin(held, vocab)
    try:
        constraint.take(vocab.known.tokens.tokenize_str(text, parse_special=True))
        mask = constraint.mask()
    except RanOut:
        return False
    return mask is not None and bool(mask[END >> 3] >> (END & 7) & 1)


def require_good(name: str, calls: Sequence[CallFinished]) -> None:
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    for each in calls:
        if not syntax(name).unread:  # else what is written by chance is no argument
            assert each.status is CallStatus.VALID
            assert satisfies(schemas[each.call.name], each.call.arguments)
        assert each.status is CallStatus.MALFORMED or each.call.name in schemas


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_forced_is_read_as_calls(name: str, most: int, vocab: Vocab) -> None:
    ended = 0
    for seed in range(9):
        if ended:
            break
        text = wander(message(name, speaks=False, most=most), vocab, seed)
        if text is None:
            continue
        said, calls = read(name, text)
        assert not said.strip(), text
        assert 1 <= len(calls) <= (most or 99), text
        require_good(name, calls)
        ended += 1
    by_chance = syntax(name).unread and vocab.known.spell(THINK[0]) == [THINK[0]]
    assert ended or by_chance  # nobody writes the end of an argument by chance, letter by letter


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_that_may_be_either_is_read_as_what_it_is(name: str, vocab: Vocab) -> None:
    speaks = message(name, speaks=True)
    for seed in range(4):
        if (text := wander(speaks, vocab, seed)) is not None:
            require_good(name, read(name, text)[1])
    how = speaks.calls
    assert how is not None
    arguments = how.syntax.unread or '{"place": "Uri"}'
    call = f"{how.syntax.opens}weather{how.syntax.middle}{arguments}{how.syntax.closes}".replace(ID, "abcdefgh9")
    for taken in ("Hello", "", call, f"<think>\nI call.\n</think>\n\n{call}"):
        assert takes(speaks, vocab, taken), taken
    for refused in (call.replace("weather", "wether"), f"<think>So</think>{call.replace('weather', 'wether')}"):
        assert not takes(speaks, vocab, refused), refused
    if how.mark:
        assert takes(speaks, vocab, f"Let me see. {call}")
    if not how.syntax.unread:
        assert not takes(speaks, vocab, call.replace("Uri", "Bern"))


@pytest.mark.parametrize("name", FORMATS)
def test_where_no_call_is_wanted_none_is_read(name: str, vocab: Vocab) -> None:
    silent = replace(message(name, speaks=True), calls=None)
    for seed in range(4):
        text = wander(silent, vocab, seed)
        assert text is None or not read(name, text)[1], text
    assert takes(silent, vocab, "<think>Perhaps { I call.</think>\n\nNo, I don't.")
    opens = syntax(name).opens
    assert not takes(silent, vocab, f"{opens}weather")
    assert not takes(silent, vocab, f"<think>So</think>\n{opens}weather")


def test_a_response_format_begins_behind_the_reasoning(vocab: Vocab) -> None:
    for grammar, good, bad in (
        (Grammar(GrammarKind.JSON_SCHEMA, (PLACE,)), '{"place": "Uri"}', '{"place": "Bern"}'),
        (Grammar(GrammarKind.REGEX, ("[a-z<>/ ]+",)), "a/b <c>", "A"),
        (Grammar(GrammarKind.CHOICES, ("yes", "no/", "a\nb")), "a\nb", "none"),
        (Grammar(GrammarKind.LARK, ('start: A " " B\nA: /[0-9]+/\nB: "x"',)), "12 x", "12"),
    ):
        alone = Message(Thought(*THINK), text=grammar)
        begun = Message(Thought("", THINK[1]), text=grammar)
        assert takes(alone, vocab, good)
        assert takes(alone, vocab, f"<think>\nIs it {bad}? {good}?\n</think>\n\n{good}")
        assert takes(begun, vocab, f"\nIs it {bad}?\n</think>\n\n{good}")
        for wrong in (bad, f"<think>Hm</think>{bad}", "<think>Hm</think>", f"<think>{good}"):
            assert not takes(alone, vocab, wrong), wrong
        assert not takes(begun, vocab, good)
        if grammar.kind is not GrammarKind.LARK:
            either = message("json_tools", speaks=True, text=grammar)
            call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
            assert takes(either, vocab, good)
            assert takes(either, vocab, call)
            assert takes(either, vocab, f"<think>Hm</think>{call}")
            assert not takes(either, vocab, "Hello. " + call)


def test_marks_that_are_tokens_are_in_no_text(vocab: Vocab) -> None:
    pieces = vocab.known.spell('a<tool_call>\n{"')
    assert "".join(map(str, pieces)).startswith("a")
    if len(pieces) == 3:
        mask = begin(Message(marks=("<tool_call>",)), vocab).mask()
        assert mask is not None
        token = int(pieces[1])
        assert not mask[token >> 3] >> (token & 7) & 1
    else:
        assert pieces == ['a<tool_call>\n{"']


def test_what_can_not_be_forced_is_not() -> None:
    one = "<|tool_call_start|>[first(place='Uri')]<|tool_call_end|>"
    assert syntax_of(BY_NAME["pythonic"], CALLED, one, "", "") is None
    assert syntax_of(BY_NAME["json_tools"], CALLED, "<tool_call>first</tool_call>", "", "") is None
