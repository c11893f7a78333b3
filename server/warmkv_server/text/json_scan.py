"""JSON as it comes, character by character: where a value ends, whatever stands inside its strings."""

from __future__ import annotations

import json

SPACE = " \t\r\n"
_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args")
_IDS = ("id", "tool_call_id", "call_id")
_BESIDES = ("type",)
_SCALAR_ENDS = frozenset(",]};" + SPACE)


class ValueScan:
    """One value. `take` is given text until `done`."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._scalar = False

    def take(self, text: str, at: int) -> int:
        """Where what belongs to the value ends in the text."""
        while at < len(text) and not self.done:
            char = text[at]
            if self._scalar and char in _SCALAR_ENDS:
                self.done = True
                return at
            if self._in_string:
                self._string(char)
            else:
                self._outside(char)
            at += 1
        return at

    def _string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            self.done = self._depth == 0

    def _outside(self, char: str) -> None:
        if self._scalar:
            return
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth <= 0
        elif self._depth == 0:
            self._scalar = True


class CallScan:
    """One call as a JSON object: its name, its arguments as they are written, its id.

    Args:
        keyed: whether its only key is the name, and what stands there the arguments.

    Attributes:
        done: whether the object is complete.
        broken: whether it is none, or none of a call.
        ready: whether its name is known, and its arguments have begun.
        id_when_ready: its id, as far as it was known then.
        strange: whether it had a key before that no call has.
    """

    def __init__(self, *, keyed: bool = False) -> None:
        self._keyed = keyed
        self.done = self.broken = self.ready = self.strange = False
        self.name = self.id = self.id_when_ready = ""
        self.raw = ""
        self._arguments: list[str] = []
        self._told = 0
        self._expects = "{"
        self._key = ""
        self._piece = ""
        self._value: ValueScan | None = None
        self._streams = self._has_arguments = False

    @property
    def arguments(self) -> str:
        return "".join(self._arguments)

    def fresh(self) -> str:
        """What came of the arguments since this was last asked."""
        pieces, self._told = self._arguments[self._told :], len(self._arguments)
        return "".join(pieces)

    def take(self, text: str, at: int) -> int:
        """Where what belongs to the object ends in the text, as far as it goes."""
        first = at
        while at < len(text) and not self.done and not self.broken:
            at = self._inside(text, at) if self._value is not None else self._between(text, at)
        self.raw += text[first:at]
        if self.done and not self.broken:
            self.broken = not _is_object(self.raw) or not _is_object(self.arguments or "{}")
            if not self._arguments:
                self._arguments.append("{}")
        return at

    def _between(self, text: str, at: int) -> int:
        """Look at one character that is in no value."""
        char = text[at]
        if char in SPACE:
            return at + 1
        if self._expects == "key" and char == '"':
            self._expects, self._value, self._piece = "key ends", ValueScan(), ""
            return at
        if self._expects == "value":
            self._expects, self._value, self._piece = "value ends", ValueScan(), ""
            self._begin_value(char)
            return at
        if self._expects == "{" and char == "{":
            self._expects = "key"
        elif self._expects == ":" and char == ":":
            self._expects = "value"
        elif self._expects == "," and char == ",":
            self._expects = "key"
        elif self._expects in ("key", ",") and char == "}":
            self.done = True
        else:
            self.broken = True
        return at + 1

    def _begin_value(self, char: str) -> None:
        if self._keyed:
            self.broken = self._has_arguments or char != "{"
            self.name = self.name or self._key
            self._streams = self._has_arguments = char == "{"
        elif self._key in _ARGUMENTS:
            self.broken = self._has_arguments or char not in '{"n'
            self._streams = char == "{"
            self._has_arguments = self._streams
        elif self._key in (*_NAMES, *_IDS):
            self._streams = False
        else:
            self._streams = False
            self.strange = self.strange or (not self.ready and self._key not in _BESIDES)
        self._look()

    def _inside(self, text: str, at: int) -> int:
        assert self._value is not None
        end = self._value.take(text, at)
        piece = text[at:end]
        if self._expects == "value ends" and self._streams:
            self._arguments.append(piece)
        else:
            self._piece += piece
        if self._value.done:
            self._value = None
            if self._expects == "key ends":
                self._key, self._expects = str(_decoded(self._piece) or ""), ":"
            else:
                self._end_value()
                self._expects = ","
        return end

    def _end_value(self) -> None:
        value = None if self._streams else _decoded(self._piece)
        if self._key in _ARGUMENTS and not self._streams:
            # As text in text, or nothing.
            self.broken = self.broken or not isinstance(value, str | None)
            self._arguments.append(str(value or "{}"))
            self._has_arguments = True
        elif self._key in _NAMES and isinstance(value, str) and not self.name:
            self.name = value
        elif self._key in _NAMES:
            self.broken = True
        elif self._key in _IDS and isinstance(value, str | int):
            self.id = str(value)
        self._look()

    def _look(self) -> None:
        """Whether it can be told of now."""
        if not self.ready and not self.broken and self.name and self._has_arguments:
            self.ready, self.id_when_ready = True, self.id


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_object(text: str) -> bool:
    return isinstance(_decoded(text), dict)
