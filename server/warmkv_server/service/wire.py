"""What can be refused of a request before a message is made of its bytes.

A message of sixteen megabytes can hold eight million empty chat messages: to make objects of them takes most of a
second, in which nothing else happens, and half a gigabyte. So the bytes are looked through first, field by field, up to
the bounds in limits.py; content itself, text and ids, is skipped or counted at the speed of memory.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import NamedTuple, cast

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.errors import ContextTooLong, InvalidField, MalformedMessage, Violation, WarmKVError
from warmkv_server.service import limits

_AROUND_IDS = 2
"""Numbers around the ids: their tag and their length."""
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
_TEXTS = (
    pb.Content.DESCRIPTOR.fields_by_name["text"],
    pb.ChatMessage.DESCRIPTOR.fields_by_name["content"],
    pb.ChatMessage.DESCRIPTOR.fields_by_name["reasoning"],
    pb.ContentPart.DESCRIPTOR.fields_by_name["text"],
    pb.ToolCall.DESCRIPTOR.fields_by_name["arguments_json"],
)
_OTHER_TEXTS = {"vllm.grpc.engine.TokenizedInput.original_text"}
"""Content of messages of other packages, which need not be there."""
_NUMBERS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32)
_IMAGE = pb.ContentPart.DESCRIPTOR.fields_by_name["image"]
_ENTRIES = {pb.ChatMessages.DESCRIPTOR.fields_by_name["messages"]: limits.CHAT_MESSAGES}


class _Malformed(Exception):
    """The bytes are no message; whoever decodes them says so."""


class _Field(NamedTuple):
    """What is looked at of one field.

    Attributes:
        entries: that it may have, if it is a list.
        indexed: whether its entries have numbers.
        is_text: whether it is content.
        is_numbers: whether it is a list of ids, in one piece.
        is_image: whether it is refused for what it is, and not for its length.
        kind: of a message, which is looked into.
    """

    name: str
    entries: int
    indexed: bool
    is_text: bool
    is_numbers: bool
    is_image: bool
    kind: Descriptor | None


class _Position(NamedTuple):
    """Where in a message something is."""

    within: _Position | None
    field: _Field
    number: int

    def __str__(self) -> str:
        own = f"{self.field.name}[{self.number}]" if self.field.indexed else self.field.name
        return f"{self.within}.{own}" if self.within else own


def refusal(data: bytes, kind: type[Message], text_bytes: int | None = None) -> WarmKVError | None:
    """Why a message can't be taken, as far as its lengths tell. Costs milliseconds, whatever the bytes are.

    Args:
        kind: of the message.
        text_bytes: of content that a context can hold at most; None if that isn't known.
    """
    walk = _Walk(data, text_bytes)
    try:
        walk.message(0, len(data), _fields(cast(Descriptor, kind.DESCRIPTOR)), None, 0)
    except _Malformed:
        return None
    except WarmKVError as error:
        return error
    if walk.found:
        return InvalidField("; ".join(f"{v.field} {v.description}" for v in walk.found), violations=walk.found)
    return None


@cache
def _fields(kind: Descriptor) -> dict[int, _Field]:
    return {field.number: _field(field) for field in kind.fields}


def _field(field: FieldDescriptor) -> _Field:
    kind = field.message_type
    indexed = field.is_repeated and not (kind is not None and kind.GetOptions().map_entry)
    entries = _ENTRIES.get(field, limits.LIST_ENTRIES) if field.is_repeated else limits.MESSAGE_FIELDS
    is_text = field in _TEXTS or field.full_name in _OTHER_TEXTS
    is_numbers = field.is_repeated and field.cpp_type in _NUMBERS
    return _Field(field.name, entries, indexed, is_text, is_numbers, field == _IMAGE, kind)


_IDS = pb.TokenIds.DESCRIPTOR


class _Walk:
    def __init__(self, data: bytes, text_bytes: int | None) -> None:
        self._data = data
        self._left = limits.MESSAGE_FIELDS
        self._text_bytes = text_bytes
        self._text = 0
        self._ids = 0
        self._entries: Counter[int] = Counter()
        self.found: list[Violation] = []

    def message(self, at: int, end: int, fields: dict[int, _Field], place: _Position | None, depth: int) -> None:
        """Look through the bytes of one message.

        Args:
            depth: messages that it is in.

        Raises:
            InvalidField, ContextTooLong, MalformedMessage: if there is no point in going on.
        """
        if depth > limits.NESTING:
            raise MalformedMessage(f"the request has messages in messages, more than {limits.NESTING} deep")
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise InvalidField(
                    f"the message has more than {limits.MESSAGE_FIELDS} fields; send less at a time",
                    limit=limits.MESSAGE_FIELDS,
                    unit="fields",
                )
            tag, at = self._varint(at, end)
            field = fields.get(tag >> 3)
            number = self._count(field, place) if field is not None else 0
            kind = tag & 7
            if kind == _BYTES:
                length, at = self._varint(at, end)
                if length > end - at:
                    raise _Malformed
                if field is not None and length:
                    self._inside(at, at + length, _Position(place, field, number), depth)
                at += length
            elif kind == _VARINT:
                _, at = self._varint(at, end)
            elif kind in _FIXED:
                at += _FIXED[kind]
            else:
                raise MalformedMessage("the request's bytes have groups in them, which no field of it is")

    def _count(self, field: _Field, place: _Position | None) -> int:
        """Count an entry of a list, and return its number."""
        number = self._entries[id(field)]
        if number >= field.entries:
            path = f"{place}.{field.name}" if place else field.name
            raise InvalidField.of(
                path, f"may have {field.entries} entries at most", limit=field.entries, unit="entries"
            )
        self._entries[id(field)] = number + 1
        return number

    def _inside(self, at: int, end: int, place: _Position, depth: int) -> None:
        field = place.field
        if field.kind is _IDS or field.is_numbers:
            # Each number ends with a byte whose highest bit is clear.
            self._ids += int(np.count_nonzero(np.frombuffer(self._data, np.int8, end - at, at) >= 0))
            if self._ids > limits.TOKEN_IDS + _AROUND_IDS:
                raise InvalidField.of(
                    f"{place}.ids" if field.kind is _IDS else str(place),
                    f"may have {limits.TOKEN_IDS} entries at most",
                    limit=limits.TOKEN_IDS,
                    actual=self._ids,
                    unit="entries",
                )
        elif field.kind is not None:
            self.message(at, end, _fields(field.kind), place, depth + 1)
        elif field.is_text:
            self._text += end - at
            if self._text_bytes is not None and self._text > self._text_bytes:
                raise ContextTooLong(
                    f"the content is longer than {self._text_bytes} bytes, and no text of that length fits into a "
                    "context of this server; send less",
                    field="content",
                    limit=self._text_bytes,
                    actual=self._text,
                    unit="bytes",
                )
        elif end - at > limits.STRING_BYTES and not field.is_image and len(self.found) < limits.VIOLATIONS:
            rule = f"has {end - at} bytes; no string but content may have more than {limits.STRING_BYTES}"
            self.found.append(Violation(str(place), rule, limits.about(limits.STRING_BYTES, end - at, "bytes")))

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number that begins there, and where it ends."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            if byte < 128:
                return value | byte << shift, at
            value |= (byte & 127) << shift
        raise _Malformed
