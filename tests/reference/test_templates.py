"""Seventy real chat templates: nothing is lost, and what is appended is what the whole conversation has there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.engine.tokenizers import ids
from tests.reference import sources
from tests.reference.conftest import fetched
from tests.reference.marks import Marked, marked
from warmkv_server.agents.context import ending_after
from warmkv_server.contract.content import Chat, ChatMessage
from warmkv_server.contract.conversation import Ending
from warmkv_server.errors import InvalidField, Unsupported
from warmkv_server.text.task import TAIL
from warmkv_server.text.text import Text

ROLES = ("system", "user", "assistant", "tool", "developer")
PLANS = [
    *((role,) for role in ROLES),
    *((role, "user") for role in ROLES),
    ("system", "system", "user"),
    ("system", "user", "system", "user"),
    ("user", "assistant", "tool"),
    ("system", "user", "assistant", "system", "user"),
]
TURNS = 6
NEED_TOOLS = ("command-r-plus-tool_use", "Hermes-2-Pro", "Hermes-3-Llama", "firefunction-v2")
"""Parts of the names of templates that transformers itself can't render without tools."""


@cache
def all_of_them() -> list[Path]:
    return sources.templates()


def test_all_of_them(tmp_path: Path) -> None:
    paths = fetched(all_of_them)
    assert len(paths) >= 70
    talks = lossless = 0
    equal: list[str] = []
    for path in paths:
        template = path.read_text()
        made = marked(template, tmp_path / path.stem)
        text = Text(made.tokenizer, len(made.tokenizer))
        lossless += nothing_is_lost(path.stem, made, text)
        if not any(part in path.stem for part in NEED_TOOLS):
            talks += 1
            if six_turns(path.stem, made, text):
                equal.append(path.stem)
    print(
        f"{len(paths)} templates, {lossless} requests of which none lost a message; {talks} talks of {TURNS} turns, "
        f"{len(equal)} of them token for token what transformers makes of the whole, the others in what was appended"
    )
    assert len(equal) >= 30


def go_on(
    text: Text, held: Sequence[int], ending: str, messages: Sequence[ChatMessage], answer: bool
) -> tuple[list[int], bool]:
    """The whole context, and whether the messages wait."""
    new = text.encode(
        Chat(tuple(messages)), starts=not held, ending=ending, held=len(held), tail=tuple(held[-TAIL:]), answer=answer
    )
    return [*held[: len(held) - new.replaced], *new.tokens.tolist()], new.holds_back


def nothing_is_lost(name: str, made: Marked, text: Text) -> int:
    """Each message's text is in the context's tokens, or the request is refused by the message's name."""
    number = tried = 0
    refusals: list[InvalidField | Unsupported] = []
    for where in ("generate", "prime", "behind an answer", "behind a question"):
        for plan in PLANS:
            messages = []
            for role in plan:
                number += 1
                messages.append(ChatMessage(role, f"Words of number {number * 7919}."))
            held: list[int] = []
            ending, answer = "", where != "prime"
            tried += 1
            try:
                if where.startswith("behind"):
                    answered = where == "behind an answer"
                    held, _ = go_on(text, held, ending, [ChatMessage("user", "Really?")], answered)
                    held += [*ids(made.tokenizer, "Yes"), made.end] if answered else []
                    ending = Ending.ANSWER if answered else "turn user"
                whole, waits = go_on(text, held, ending, messages, answer)
                if waits:
                    ending = ending_after(Chat(tuple(messages)), answered=False, previous="", holds_back=True)
                    whole, _ = go_on(text, whole, ending, [ChatMessage("user", "Go on.")], True)
            except (InvalidField, Unsupported) as refused:
                refusals.append(refused)
                continue
            written = made.tokenizer.decode(whole)
            assert all(message.content in written for message in messages), (name, where, plan, written)
            assert "'type': 'text'" not in written
    for refusal in refusals:
        fields = [violation.field for violation in refusal.violations]
        assert isinstance(refusal, Unsupported) or fields[0].startswith("content.chat.messages["), (name, str(refusal))
    return tried


def six_turns(name: str, made: Marked, text: Text) -> bool:
    """Whether the context is what transformers makes of the whole; what was appended always is."""
    messages: list[tuple[str, str]] = []
    held: list[int] = []
    equal = True
    for turn in range(TURNS):
        messages.append(("user", f"What is question number {turn}?"))
        before = held
        held, _ = go_on(text, held, Ending.ANSWER if held else "", [ChatMessage(*messages[-1])], True)
        whole = ids(made.tokenizer, made.render(messages, True))
        same = sum(1 for _ in iter_alike(before, held))
        appended = held[same:]
        assert whole[len(whole) - len(appended) :] == appended, (name, turn, made.tokenizer.decode(appended))
        equal = equal and held == whole
        messages.append(("assistant", f"Answer {turn} is here"))
        held = [*held, *ids(made.tokenizer, messages[-1][1]), made.end]
    return equal


def iter_alike(first: Sequence[int], second: Sequence[int]) -> Sequence[int]:
    """The tokens that both begin with."""
    length = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    return first[:length]
