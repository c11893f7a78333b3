"""The file of one node and kind: safetensors, with a header that says which context it is, and a checksum over it all.

docs/format.md describes it for other programs. Functions here turn a description into header bytes and back, and check
what a file says; `files.py` moves the bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from warmkv_server.contract.kv import Fallback, PartKind, TensorSpec, known_kind
from warmkv_server.kv.blocks.arrays import RawArray, stored_shape
from warmkv_server.kv.blocks.names import TOKEN_BYTES, block_of

FORMAT = "warmkv-block"
VERSION = 2
_READABLE = ("1", "2")
"""Versions of a header: 1 has neither codecs nor an extra key."""

LENGTH_BYTES = 8
"""The header's length, little-endian, opens a safetensors file."""
_BEGIN = b'{"__metadata__":{"xxh3_128":"'
DIGEST_AT = LENGTH_BYTES + len(_BEGIN)
DIGEST_HEX = 32
_NO_DIGEST = b"0" * DIGEST_HEX
HEADER_LIMIT = 1 << 20
"""Bytes before the payload at most."""
_ALIGN = 64

_SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}


class BadFile(Exception):
    """A block file that must not be used, and why.

    Attributes:
        version: of the object that was read, as its tier has it; None where there was none.
    """

    def __init__(self, reason: Fallback, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.version: object = None


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What a block file says about itself.

    Attributes:
        node, parent: ids in hex.
        start, count: the node's tokens, counted from the context's start; count 0 for a snapshot.
        block_tokens: int32 ids from the start of the node's block to the node's end.
        fingerprint: digest.
        extra_key: what the KV is a function of besides, if anything.
    """

    kind: PartKind
    node: str
    parent: str
    start: int
    block_tokens: bytes
    fingerprint: str
    tenant: str
    extra_key: bytes = b""

    @property
    def count(self) -> int:
        return block_of(self.start) + len(self.block_tokens) // TOKEN_BYTES - self.start

    def metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": str(VERSION),
            "kind": self.kind,
            "node": self.node,
            "parent": self.parent,
            "start": str(self.start),
            "count": str(self.count),
            "tokens": base64.b64encode(self.block_tokens).decode(),
            "fingerprint": self.fingerprint,
            "tenant": self.tenant,
            **({"extra_key": self.extra_key.hex()} if self.extra_key else {}),
        }


def header(info: BlockInfo, specs: Sequence[TensorSpec]) -> bytearray:
    """The bytes before the payload, with zeros in the checksum's place.

    Args:
        specs: the tensors in the order in which their bytes follow.
    """
    codecs = codecs_of(specs)
    described: dict[str, object] = {
        "__metadata__": {
            "xxh3_128": _NO_DIGEST.decode(),
            **info.metadata(),
            **({"codecs": _compact(codecs)} if codecs else {}),
        }
    }
    offset = 0
    for spec in specs:
        shape = stored_shape(spec, info.count)
        size = math.prod(shape) * np.dtype(spec.dtype).itemsize
        described[spec.name] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    return _pack(described)


def renamed(content: bytes, info: BlockInfo) -> tuple[bytearray, memoryview, str]:
    """A good file under another name: its new header, its payload, in which no tensor changes, and the checksum."""
    start = header_size(content, len(content))
    described = json.loads(content[LENGTH_BYTES:start])
    before = described["__metadata__"]
    codecs = {"codecs": before["codecs"]} if "codecs" in before else {}
    described["__metadata__"] = {"xxh3_128": _NO_DIGEST.decode(), **info.metadata(), **codecs}
    head, payload = _pack(described), memoryview(content)[start:]
    return head, payload, put_checksum(head, [payload])


def _pack(described: dict[str, object]) -> bytearray:
    text = _compact(described).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % _ALIGN)
    return bytearray(len(text).to_bytes(LENGTH_BYTES, "little") + text)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def codecs_of(specs: Iterable[TensorSpec]) -> dict[str, str | list[str]]:
    """How each family of streams is coded, by the name that its tensors begin with: all of them, or one by one."""
    found: dict[str, str | list[str]] = {}
    for spec in specs:
        if spec.codecs:
            alike = len(set(spec.codecs)) == 1
            found[spec.name.partition(".")[0]] = spec.codecs[0] if alike else list(spec.codecs)
    return found


def put_checksum(head: bytearray, payload: Iterable[memoryview]) -> str:
    """Compute the checksum over header and payload and put it into the header."""
    digest = checksum(head, payload)
    head[DIGEST_AT : DIGEST_AT + DIGEST_HEX] = digest.encode()
    return digest


def checksum(head: bytes | bytearray, payload: Iterable[memoryview]) -> str:
    """xxh3-128 of the whole file with zeros in the checksum's place, in hex."""
    hasher = begin_checksum(head)
    for buffer in payload:
        hasher.update(buffer)
    return hasher.hexdigest()


def begin_checksum(head: bytes | bytearray) -> xxhash.xxh3_128:
    hasher = xxhash.xxh3_128(bytes(head[:DIGEST_AT]))
    hasher.update(_NO_DIGEST)
    hasher.update(bytes(head[DIGEST_AT + DIGEST_HEX :]))
    return hasher


def digest_in(head: bytes) -> str | None:
    """The checksum that the beginning of a file says it has; None if it isn't one of ours."""
    digest = head[DIGEST_AT : DIGEST_AT + DIGEST_HEX]
    begins = head[LENGTH_BYTES:DIGEST_AT] == _BEGIN
    good = begins and len(digest) == DIGEST_HEX and set(digest) <= set(b"0123456789abcdef")
    return digest.decode() if good else None


def payload_size(specs: Sequence[TensorSpec], count: int) -> int:
    return sum(math.prod(stored_shape(s, count)) * np.dtype(s.dtype).itemsize for s in specs)


def header_bytes(block_tokens: bytes) -> int:
    """About how many bytes a header takes."""
    return 1024 + len(block_tokens) * 4 // 3


def ordered(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The order of a file's tensors: wide elements first, so that each is aligned."""
    return tuple(sorted(specs, key=lambda s: -np.dtype(s.dtype).itemsize))


def header_size(first: bytes, file_size: int) -> int:
    """Bytes before the payload, the length field included.

    Raises:
        BadFile: the file is too short, or the length can't be one.
    """
    if len(first) < LENGTH_BYTES:
        raise BadFile(Fallback.FORMAT, "shorter than a safetensors header")
    size = int.from_bytes(first[:LENGTH_BYTES], "little") + LENGTH_BYTES
    if size > min(file_size, HEADER_LIMIT):
        raise BadFile(Fallback.FORMAT, f"header of {size} bytes in a file of {file_size}")
    return size


@dataclass(frozen=True, slots=True)
class Parsed:
    """A header, taken apart but not yet believed: only the checksum says that it is what was written."""

    info: BlockInfo
    digest: str
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    """dtype in safetensors' words, shape, first and last byte of the payload."""
    payload: int
    codecs: Mapping[str, object] | None = None
    """By family of streams; None in a header that says nothing of it: then it is the one that the fingerprint names."""


def parse(head: bytes) -> Parsed:
    """
    Args:
        head: all bytes before the payload.

    Raises:
        BadFile: not a header of ours, of another version, or contradicting itself.
    """
    try:
        described = json.loads(head[LENGTH_BYTES:])
        meta = described.pop("__metadata__")
        if meta["format"] != FORMAT or meta["version"] not in _READABLE:
            raise BadFile(Fallback.FORMAT, f"format {meta['format']} {meta['version']}, not {FORMAT} {VERSION}")
        info = BlockInfo(
            kind=known_kind(meta["kind"]),
            node=meta["node"],
            parent=meta["parent"],
            start=int(meta["start"]),
            block_tokens=base64.b64decode(meta["tokens"], validate=True),
            fingerprint=meta["fingerprint"],
            tenant=meta["tenant"],
            extra_key=bytes.fromhex(meta.get("extra_key", "")),
        )
        codecs = dict(json.loads(meta["codecs"])) if "codecs" in meta else None
        if not 0 <= info.start < 1 << 63:
            raise BadFile(Fallback.FORMAT, f"no context has a token {info.start}")
        if int(meta["count"]) != info.count:
            raise BadFile(Fallback.FORMAT, "the count doesn't fit the tokens")
        tensors = {name: (t["dtype"], tuple(t["shape"]), *map(int, t["data_offsets"])) for name, t in described.items()}
        payload = max((last for *_, last in tensors.values()), default=0)
        if head[DIGEST_AT : DIGEST_AT + DIGEST_HEX].decode() != meta["xxh3_128"]:
            raise BadFile(Fallback.FORMAT, "the checksum is not where it belongs")
        return Parsed(info, meta["xxh3_128"], tensors, payload, codecs)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
        raise BadFile(Fallback.FORMAT, f"unreadable header: {error!r}") from error


def verify(content: bytes) -> Parsed:
    """Check a whole file in memory against itself, whatever model it is of.

    Raises:
        BadFile
    """
    start = header_size(content, len(content))
    parsed = parse(content[:start])
    if start + parsed.payload != len(content):
        raise BadFile(Fallback.FORMAT, f"{len(content)} bytes instead of {start + parsed.payload}")
    if checksum(content[:start], [memoryview(content)[start:]]) != parsed.digest:
        raise BadFile(Fallback.CHECKSUM, "the checksum is another")
    return parsed


def expect(parsed: Parsed, info: BlockInfo, specs: Sequence[TensorSpec]) -> None:
    """Check that a file is the one that was asked for.

    Raises:
        BadFile
    """
    if parsed.info.fingerprint != info.fingerprint:
        raise BadFile(Fallback.FINGERPRINT, "of another model or setting")
    if parsed.info != info:
        raise BadFile(Fallback.FORMAT, "of another node")
    if parsed.codecs is not None and parsed.codecs != codecs_of(specs):
        raise BadFile(Fallback.FORMAT, "coded otherwise than the model's layout has it")
    offset = 0
    for spec in specs:
        shape = stored_shape(spec, info.count)
        size = math.prod(shape) * np.dtype(spec.dtype).itemsize
        if parsed.tensors.get(spec.name) != (_SAFETENSORS_DTYPES[spec.dtype], shape, offset, offset + size):
            raise BadFile(Fallback.FORMAT, f"tensor {spec.name} is not as the model's layout has it")
        offset += size
    if len(parsed.tensors) != len(specs):
        raise BadFile(Fallback.FORMAT, "more tensors than the model's layout has")


def flat(words: RawArray) -> memoryview:
    """A contiguous array's bytes."""
    return words.reshape(-1).view(np.uint8).data if words.size else memoryview(b"")


@dataclass(frozen=True, slots=True)
class Part:
    """A file, as the journal records it: its size and its xxh3-128."""

    nbytes: int
    digest: str
