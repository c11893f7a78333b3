"""Tool calls in an answer, as they are told of while it grows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from warmkv_server.contract.content import ToolCall


class CallStatus(StrEnum):
    """Whether a tool call can be executed."""

    VALID = "valid"
    UNKNOWN_TOOL = "unknown_tool"
    SCHEMA_MISMATCH = "schema_mismatch"
    MALFORMED = "malformed"
    """It is not of the model's format."""
    INCOMPLETE = "incomplete"
    """The answer ended inside it."""


@dataclass(frozen=True)
class CallStarted:
    """The tool of a call is known. `index` counts the answer's calls."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments' text."""

    index: int
    text: str


@dataclass(frozen=True)
class CallFinished:
    """A call is as complete as it gets.

    Attributes:
        written: its id as the model wrote it; empty if it wrote none.
        raw: what the model wrote, where that is malformed.
    """

    index: int
    call: ToolCall
    status: CallStatus
    raw: str = ""
    written: str = ""


CallNews = CallStarted | CallArguments | CallFinished
