"""What a request puts into a context: text, tokens or chat messages."""

from __future__ import annotations

from dataclasses import dataclass, field
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
class ToolCall:
    """A call of a tool.

    Attributes:
        arguments: a JSON object as text.
    """

    id: str
    name: str
    arguments: str = "{}"


@dataclass(frozen=True)
class Tool:
    """What a model may call.

    Attributes:
        parameters: JSON Schema of the arguments, as text; the order of its properties is what the model sees.
        strict: whether the arguments are held to it while they are sampled. It changes no token of a context.
    """

    name: str
    description: str
    parameters: str
    strict: bool = field(default=False, compare=False)


class ToolMode(StrEnum):
    """Whether a model calls tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True)
class ToolChoice:
    """What of its tools a model may call in an answer.

    Attributes:
        names: of the tools; empty for all of them.
        most: calls; 0 for as many as it likes.
    """

    mode: ToolMode = ToolMode.AUTO
    names: tuple[str, ...] = ()
    most: int = 0


AS_IT_LIKES = ToolChoice()


@dataclass(frozen=True)
class ChatMessage:
    """One turn.

    Attributes:
        reasoning: what came before an assistant's text.
        calls: that an assistant made.
        call_id, name: of the call whose result it is, and of its tool.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""

    @property
    def characters(self) -> int:
        extras = sum(len(call.id) + len(call.name) + len(call.arguments) for call in self.calls)
        return len(self.role) + len(self.content) + len(self.reasoning) + len(self.call_id) + len(self.name) + extras


@dataclass(frozen=True)
class Chat:
    """Messages.

    Attributes:
        tools: None leaves them as they are.
        variables: of the chat template, a JSON object as text; None leaves them as they are.
        continue_last: whether the last message goes on.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] | None = None
    variables: str | None = None
    continue_last: bool = False


@dataclass(frozen=True)
class Setup:
    """What a chat template writes messages with, besides themselves.

    Attributes:
        variables: a JSON object as text; empty for none.
        clock: what it takes for now, seconds since 1970.
    """

    tools: tuple[Tool, ...] = ()
    variables: str = ""
    clock: float = 0.0

    @property
    def characters(self) -> int:
        return len(self.variables) + sum(len(t.name) + len(t.description) + len(t.parameters) for t in self.tools)


NO_SETUP = Setup()


Content = RawText | TokenContent | Chat


@dataclass(frozen=True, eq=False)
class Encoded:
    """What content becomes behind a context.

    Attributes:
        tokens: to put behind it, shape (tokens,).
        replaced: how many of its last tokens give way to them.
        holds_back: whether the messages are not in them, and come with the next user's message.
        dated: whether the chat template looked at the clock.
        thinks: how many of the last ones begin reasoning that the answer goes on with.
    """

    tokens: npt.NDArray[np.int32]
    replaced: int = 0
    holds_back: bool = False
    dated: bool = False
    thinks: int = 0
