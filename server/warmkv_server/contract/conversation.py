"""What is kept of a conversation besides its tokens: what they end with, and what decides how it goes on.

It is one text, kept with the agent: a word, what the word needs, and behind a line's end, if there is any of it, what
the conversation was set up with, in JSON. So it goes wherever the agent goes: through restarts, forks and archives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from warmkv_server.contract.content import ChatMessage, Tool, ToolCall


class Ending(StrEnum):
    """What a context ends with, which decides how content goes on behind it.

    Kept with the context as text: one of these words, and behind a space what `TURN` and `HELD` have besides.
    """

    RAW = "raw"
    """Raw text or tokens, or nothing: messages follow as they are."""
    TURN = "turn"
    """A message that the template has closed, and its role."""
    ANSWER = "answer"
    """A generated answer: the template's text after an answer comes first."""
    HELD = "held"
    """Messages that the template writes with the next user's message and not before, in JSON."""

    @classmethod
    def of(cls, ending: str) -> Ending:
        """The word; raw where it is none, as an archive from elsewhere can have it."""
        word = _split(ending)[0].partition(" ")[0]
        return next((each for each in cls if each == word), cls.RAW)


@dataclass(frozen=True)
class MadeCall:
    """A call of the last answer.

    Attributes:
        id: as clients were told it.
        written: the id as the model wrote it; empty if it wrote none.
        answered: whether its result is there.
    """

    id: str
    name: str
    written: str = ""
    answered: bool = False


@dataclass(frozen=True)
class ChatState:
    """What messages behind others are written with.

    Attributes:
        variables: of the chat template, a JSON object as text; empty for none.
        clock: what the template takes for now, seconds since 1970; None while it hasn't looked.
        calls: of the last answer.
        reasoning: first token and end of each part of the context that is cut out when the next user's message comes.
    """

    tools: tuple[Tool, ...] = ()
    variables: str = ""
    clock: float | None = None
    calls: tuple[MadeCall, ...] = ()
    reasoning: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ending: str) -> ChatState:
        """The one that an ending has with it; an empty one where that can't be read."""
        told = _split(ending)[1]
        try:
            tools = tuple(
                Tool(str(t["name"]), str(t["description"]), str(t["parameters"]), t.get("strict") is True)
                for t in told["tools"]
            )
            calls = tuple(
                MadeCall(str(c["id"]), str(c["name"]), str(c["written"]), bool(c["answered"])) for c in told["calls"]
            )
            clock = told["clock"]
            reasoning = tuple((int(first), int(end)) for first, end in told["reasoning"])
            return cls(tools, str(told["variables"]), None if clock is None else float(clock), calls, reasoning)
        except (KeyError, TypeError, ValueError):
            return NOTHING_YET

    @property
    def waiting(self) -> tuple[MadeCall, ...]:
        """The calls whose results are to come."""
        return tuple(call for call in self.calls if not call.answered)


NOTHING_YET = ChatState()


def kept(ending: str, conversation: ChatState) -> str:
    """The text of an ending with what the conversation was set up with."""
    word = _split(ending)[0]
    if conversation == NOTHING_YET:
        return word
    return f"{word}\n{json.dumps(asdict(conversation), ensure_ascii=False, separators=(',', ':'))}"


def plain(ending: str) -> str:
    """The ending alone."""
    return _split(ending)[0]


def role_before(ending: str) -> str:
    """The role of the message that a context ends with; empty where nobody knows."""
    return _split(ending)[0].partition(" ")[2] if Ending.of(ending) is Ending.TURN else ""


def held_back(ending: str) -> tuple[ChatMessage, ...]:
    """The messages that a context holds back: all that it was made of. None where they can't be read."""
    if Ending.of(ending) is not Ending.HELD:
        return ()
    try:
        return tuple(_message(*parts) for parts in json.loads(_split(ending)[0].partition(" ")[2]))
    except (ValueError, TypeError, KeyError):
        return ()


def holding(messages: Sequence[ChatMessage]) -> str:
    """The ending of a context that holds these messages back."""
    listed: list[list[Any]] = []
    for message in messages:
        bare = ChatMessage(message.role, message.content)
        more = {name: value for name, value in asdict(message).items() if value != getattr(bare, name)}
        listed.append([message.role, message.content, *([more] if more else [])])
    return f"{Ending.HELD} {json.dumps(listed, ensure_ascii=False)}"


def _message(role: str, content: str, more: dict[str, Any] | None = None) -> ChatMessage:
    message = ChatMessage(str(role), str(content))
    if more:
        calls = tuple(ToolCall(str(c["id"]), str(c["name"]), str(c["arguments"])) for c in more.pop("calls", ()))
        message = replace(message, calls=calls, **{name: str(value) for name, value in more.items()})
    return message


def _split(ending: str) -> tuple[str, dict[str, Any]]:
    """The ending, and what stands behind its last line's end if that is a JSON object."""
    word, _, told = ending.rpartition("\n")
    if not told.startswith("{"):
        return ending, {}
    try:
        found = json.loads(told)
    except (ValueError, RecursionError):
        return ending, {}
    return (word, found) if isinstance(found, dict) else (ending, {})
