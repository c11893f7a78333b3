"""Real chat templates with tools: a result behind a call is what the whole conversation has there, or it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.engine.tokenizers import ids
from tests.reference import sources
from tests.reference.conftest import fetched
from tests.reference.marks import Marked, marked
from warmkv_server.contract.calls import CallStatus
from warmkv_server.contract.content import Chat, ChatMessage, Setup, Tool, ToolCall
from warmkv_server.contract.conversation import Ending, MadeCall
from warmkv_server.contract.grammar import ID, NUMBER
from warmkv_server.errors import InvalidField, Unsupported
from warmkv_server.text.reader import MessageReader
from warmkv_server.text.render import message_as_told, tool_as_told
from warmkv_server.text.task import TAIL
from warmkv_server.text.text import Text

TOOL = Tool("weather", "The weather.", '{"type": "object", "properties": {"place": {"type": "string"}}}')
CALL = ToolCall("warmkv001", "weather", '{"place": "Uri"}')
MADE = MadeCall(CALL.id, CALL.name)
QUESTION = ChatMessage("user", "What is the weather?")
CALLS = ChatMessage("assistant", "", calls=(CALL,))
RESULT = ChatMessage("tool", "It rains in Uri.", call_id=CALL.id, name=CALL.name)
ANSWER = ChatMessage("assistant", "Rain, then.")
THANKS = ChatMessage("user", "Thank you, and elsewhere?")
OTHER_ENDS = (
    "<|call|>",
    "<|eom_id|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|im_end|>",
    "<|calls|>",
    "<|tools_suffix|>",
    "<|tool_response>",
)
"""Besides the one that closes an answer: what models' generation_config.json name, too."""
UNFORCED = ("pythonic", "gemma4", "minicpm5", "functionary_v3_2")
"""Formats of calls that a grammar can't say before their arguments are known, or whose texts begin as calls do."""


@cache
def all_of_them() -> list[Path]:
    return sources.templates()


def test_results_behind_calls(tmp_path: Path) -> None:
    formats: dict[str, str] = {}
    for path in fetched(all_of_them):
        made = marked(path.read_text(), tmp_path / path.stem)
        known = made.tokenizer.get_vocab()
        made.tokenizer.eos_token_ids = {made.end, *(known[end] for end in OTHER_ENDS if end in known)}
        text = Text(made.tokenizer, len(made.tokenizer))
        form = text.traits.form
        formats[path.stem] = form.name if form is not None else ""
        if form is None:
            refuses_tools(path.stem, text)
        else:
            two_rounds(path.stem, made, text)
            forced_is_read(path.stem, text)
    able = {name: form for name, form in formats.items() if form}
    print(f"{len(able)} of {len(formats)} templates have calls that are read back and followed up:")
    print("\n".join(f"  {name}: {form}" for name, form in able.items()))
    assert len(able) >= 49


def go_on(
    text: Text, held: Sequence[int], message: ChatMessage, calls: Sequence[MadeCall] = ()
) -> tuple[list[int], int]:
    """What a message behind an answer becomes, and how many tokens it replaces."""
    new = text.encode(
        Chat((message,)),
        starts=not held,
        ending=Ending.ANSWER if held else "",
        held=len(held),
        tail=tuple(held[-TAIL:]),
        answer=True,
        setup=Setup((TOOL,)),
        calls=calls,
    )
    return new.tokens.tolist(), new.replaced


def two_rounds(name: str, made: Marked, text: Text) -> None:
    """A call, its result, an answer, and another question: each is appended as the whole has it."""
    held, _ = go_on(text, [], QUESTION)
    prompt, called = render(made, text, [QUESTION], True), render(made, text, [QUESTION, CALLS], False)
    same = next(n for n, (a, b) in enumerate(zip(prompt + "\0", called + "\0", strict=False)) if a != b)
    same = (
        min(same, prompt.rfind(mark)) if (mark := (text.traits.reasoning or ("\0",))[0]) in prompt[same - 8 :] else same
    )
    answer = called[same:]
    ends = {token: made.tokenizer.convert_ids_to_tokens(token) for token in made.tokenizer.eos_token_ids}
    at, end = min(
        ((answer.find(mark), token) for token, mark in ends.items() if mark in answer), default=(None, made.end)
    )
    reader = MessageReader(text.traits.reasoning, text.traits.form, str, tools=[TOOL])
    reader.push(answer[:at])
    reader.finish()
    assert [call.call.name for call in reader.finished] == [CALL.name], (name, answer)
    held = [*held, *ids(made.tokenizer, answer[:at]), end]
    messages = [QUESTION, CALLS]
    for message, reply in ((RESULT, ANSWER), (THANKS, ANSWER)):
        messages.append(message)
        new, replaced = go_on(text, held, message, (MADE,) if message is RESULT else ())
        whole = ids(made.tokenizer, render(made, text, messages, True))
        assert whole[len(whole) - len(new) :] == new, (name, made.tokenizer.decode(new))
        assert replaced <= 1
        messages.append(reply)
        held = [*held[: len(held) - replaced], *new, *ids(made.tokenizer, reply.content), made.end]


def forced_is_read(name: str, text: Text) -> None:
    """Calls that are forced stand as the template writes them, and are read back as calls."""
    traits = text.traits
    assert traits.form is not None
    syntax = traits.syntax
    assert (syntax is None) == (traits.form.name in UNFORCED), name
    if syntax is None:
        return
    arguments = syntax.unread + syntax.closes if syntax.unread else CALL.arguments
    calls = ["forced", "forced_too"] if syntax.again else ["forced"]
    written = ""
    for number, tool in enumerate(calls):
        before, behind = (syntax.again, syntax.middle_again) if number else (syntax.opens, syntax.middle)
        written += f"{before}{tool}{behind}{arguments}"
    written += "" if syntax.unread else syntax.closes
    reader = MessageReader(traits.reasoning, traits.form, str, tools=[TOOL])
    said = reader.push(written.replace(ID, "abcdefgh1").replace(NUMBER, "1")).text + reader.finish().text
    assert not said.strip(), (name, said)
    assert [call.call.name for call in reader.finished] == calls, (name, written)
    assert all(call.status is CallStatus.VALID for call in reader.finished), (name, written)


def render(made: Marked, text: Text, messages: Sequence[ChatMessage], answer: bool) -> str:
    as_text = text.traits.arguments_as_text
    told = [message_as_told(message, as_parts=False, arguments_as_text=as_text) for message in messages]
    tools = [tool_as_told(TOOL)]
    return str(made.reference.apply_chat_template(told, tokenize=False, add_generation_prompt=answer, tools=tools))


def refuses_tools(name: str, text: Text) -> None:
    with pytest.raises((Unsupported, InvalidField)) as caught:
        go_on(text, [], QUESTION)
    # InvalidField is for a template that renders nothing at all.
    assert "content.chat.tools" in str(caught.value) or isinstance(caught.value, InvalidField), name
