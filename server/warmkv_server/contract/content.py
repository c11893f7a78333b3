"""What a request puts into a context: text, tokens or chat messages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class RawText:
    text: str


@dataclass(frozen=True)
class TokenIds:
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]


Content = RawText | TokenIds | Chat


class Ending(StrEnum):
    """What a context ends with, which decides how chat messages go on behind it."""

    RAW = "raw"
    """Raw text or tokens, or nothing: messages follow as they are."""
    TURN = "turn"
    """A message that the template has closed."""
    ANSWER = "answer"
    """A generated answer: the template's text after an answer comes first."""
