"""What a request puts into a context: text, tokens or chat messages; and what a context ends with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RawText:
    text: str


@dataclass(frozen=True)
class TokenContent:
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    messages: tuple[ChatMessage, ...]


Content = RawText | TokenContent | Chat


@dataclass(frozen=True, eq=False)
class Encoded:
    """What content becomes behind a context.

    Attributes:
        tokens: to put behind it, shape (tokens,).
        replaced: how many of its last tokens give way to them.
        holds_back: whether the messages are not in them, and come with the next user's message.
    """

    tokens: npt.NDArray[np.int32]
    replaced: int = 0
    holds_back: bool = False


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
        word = ending.partition(" ")[0]
        return next((each for each in cls if each == word), cls.RAW)


def role_before(ending: str) -> str:
    """The role of the message that a context ends with; empty where nobody knows."""
    return ending.partition(" ")[2] if Ending.of(ending) is Ending.TURN else ""


def held_back(ending: str) -> tuple[ChatMessage, ...]:
    """The messages that a context holds back: all that it was made of. None where they can't be read."""
    if Ending.of(ending) is not Ending.HELD:
        return ()
    try:
        return tuple(ChatMessage(str(role), str(content)) for role, content in json.loads(ending.partition(" ")[2]))
    except (ValueError, TypeError):
        return ()
