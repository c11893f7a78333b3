"""What passes between the server and the processes that do its text work."""

from __future__ import annotations

import json
import pickle
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmkv_server import errors
from warmkv_server.contract.content import NO_SETUP, Chat, Content, RawText, Setup
from warmkv_server.contract.conversation import MadeCall

FORKS = sys.platform == "linux"
"""Whether the processes are forked from one that has loaded the tokenizer. Other systems don't take forks well."""

MEMORY_BYTES = 768 << 20
"""That one task may take, besides the tokenizer. Tokenising takes about 200 bytes for each byte of a text."""

HEADER = struct.Struct("!cBI")
"""Of a reply: its kind, whether the process ends itself behind it, and the length of what follows."""
ANSWER = struct.Struct("=i??B")
"""Before the tokens of a reply: how many of the context's they replace, whether messages are held back, whether the
chat template looked at the clock, and how many of the last tokens begin reasoning."""
TOKENS, FINDINGS, REFUSAL, NO_MEMORY, BROKEN = b"T", b"F", b"R", b"M", b"B"

LENGTH = struct.Struct("!Q")
"""Before everything that goes to a process."""
ORDER = struct.Struct("!cI")
"""To the process that the others are forked from: FORK with a socket, or KILL, and the number of the process."""
FORK, KILL = b"F", b"K"

TAIL = 16
"""Of a context's last tokens, those that content behind it may have to do with."""

_ERRORS = {
    kind.__name__: kind
    for kind in (errors.InvalidField, errors.Unsupported, errors.ContextTooLong, errors.ConstraintTooComplex)
}
_MESSAGE_CHARACTERS = 1000


@dataclass(frozen=True)
class TokenizerSource:
    """What mlx-lm makes the model's tokenizer of.

    Attributes:
        chat_template: None takes the tokenizer's own, if it has one.
        eos_token_ids: those that end an answer.
        defaults: of the model's class, for checkpoints without settings of their own.
        vocab_size: of the model.
    """

    folder: Path
    chat_template: str | None
    eos_token_ids: Sequence[int]
    defaults: dict[str, Any] | None
    vocab_size: int


@dataclass(frozen=True)
class Task:
    """What `Text.encode` takes.

    Attributes:
        content: None to try the tokenizer and the chat template instead, or to look at `arguments`.
        tail: the last `TAIL` tokens of the context, or all.
        traits: what is known of the chat template, as `Traits.as_json` has it.
        arguments: of calls, each behind the schema of its tool; both are JSON. Whether each satisfies it is the answer.
    """

    content: Content | None
    starts: bool = True
    ending: str = ""
    held: int = 0
    tail: tuple[int, ...] = ()
    answer: bool = True
    room: int | None = None
    setup: Setup = NO_SETUP
    calls: tuple[MadeCall, ...] = ()
    traits: Mapping[str, Any] | None = None
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def characters(self) -> int:
        match self.content:
            case RawText(text):
                return len(text)
            case Chat(messages):
                return self.setup.characters + sum(message.characters for message in messages)
        return sum(len(schema) + len(arguments) for schema, arguments in self.arguments)

    @property
    def field(self) -> str:
        if self.arguments:
            return "content.chat.tools"
        return "content.text" if isinstance(self.content, RawText) else "content.chat.messages"

    @property
    def work(self) -> str:
        """What takes the time and the memory, for people."""
        if self.arguments:
            return "looking at a call's arguments"
        return "tokenising it" if isinstance(self.content, RawText) else "the model's chat template, and tokenising,"

    def refusal(self, why: str) -> errors.WarmKVError:
        """The error for one that was stopped: which part of its request, and whose work on it, took too much."""
        return errors.InvalidField.of(self.field, f"{self.work} {why}, and was stopped; send less")


def packed(value: object) -> bytes:
    """For a process: it believes the server, and not the other way round."""
    body = pickle.dumps(value, protocol=5)
    return LENGTH.pack(len(body)) + body


def receive(connection: socket.socket) -> Any:
    """What the server sent; None at the end."""
    header = _exactly(connection, LENGTH.size)
    body = _exactly(connection, LENGTH.unpack(header)[0]) if header else b""
    return pickle.loads(body) if body else None


def refusal_bytes(error: errors.WarmKVError) -> bytes:
    violations = [(v.field, v.description[:_MESSAGE_CHARACTERS], dict(v.about)) for v in error.violations]
    return json.dumps([type(error).__name__, str(error)[:_MESSAGE_CHARACTERS], violations, error.metadata]).encode()


def refusal_of(data: bytes) -> errors.WarmKVError:
    name, message, violations, metadata = json.loads(data)
    return _ERRORS[name](message, violations=[errors.Violation(*violation) for violation in violations], **metadata)


def _exactly(connection: socket.socket, count: int) -> bytearray:
    """So many bytes, or none if the other side is gone."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        taken = connection.recv_into(view)
        if not taken:
            return bytearray()
        view = view[taken:]
    return data
