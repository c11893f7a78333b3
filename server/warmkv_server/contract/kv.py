"""The words that the engine and the store use for KV.

A context of n tokens has KV of up to three kinds. The store never looks inside: it cuts, joins, writes and reads
these arrays as bytes, so a stored value is only ever copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import mlx.core as mx

BLOCK_TOKENS = 256
"""Tokens in a full block."""

TOKEN_AXIS = 2
"""The axis of a tensor of kind APPEND or WINDOW along which tokens run: (streams, kv_heads, tokens, width)."""

Tensors = Mapping[str, mx.array]
"""Evaluated arrays by name, of dtypes that numpy has (16-bit brain floats travel as uint16)."""


class PartKind(StrEnum):
    """How a part of the KV depends on the tokens before it."""

    APPEND = "append"
    """Every token's entry is needed for as long as the context lasts. Can be cut and shared at any token."""

    WINDOW = "window"
    """Only the last `KVLayout.window` tokens' entries are needed (sliding-window and chunked attention)."""

    STATE = "state"
    """No token axis: a snapshot of recurrent state after exactly so many tokens. Can't be cut."""


@dataclass(frozen=True)
class TensorSpec:
    """One stacked tensor: the same component of all streams of one shape.

    A stream is one layer's keys or values. For APPEND and WINDOW the stored array has shape
    (streams, kv_heads, tokens, width); for STATE, `shape` is the array's own.
    """

    name: str
    kind: PartKind
    dtype: str
    """numpy's name of the dtype."""
    shape: tuple[int, ...]
    """(streams, kv_heads, width) for APPEND and WINDOW; the full shape for STATE."""
    nbytes: int
    """Bytes a token for APPEND and WINDOW; bytes a snapshot for STATE."""


@dataclass(frozen=True)
class KVLayout:
    """What a model's KV is made of. Fixed for as long as the model is loaded; part of the fingerprint."""

    tensors: tuple[TensorSpec, ...]
    window: int = 0
    """Tokens that the widest windowed layer looks back on; 0 without such layers."""
    vocabulary: int = 1 << 31
    """Token ids are below."""

    def of_kind(self, kind: PartKind) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if t.kind == kind)

    def nbytes(self, kind: PartKind) -> int:
        """Bytes a token (APPEND, WINDOW) or a snapshot (STATE) of that kind."""
        return sum(t.nbytes for t in self.tensors if t.kind == kind)

    @property
    def has_state(self) -> bool:
        return bool(self.of_kind(PartKind.STATE))


@dataclass(frozen=True)
class Span:
    """The KV of tokens [start, start + count) of one context, in RAM.

    `parts` may lack WINDOW where the tokens lie before the window, and has STATE only if a snapshot was taken after
    exactly start + count tokens.
    """

    start: int
    count: int
    parts: Mapping[PartKind, Tensors]

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class Growth:
    """The KV that the engine computed for tokens [start, start + count), to be committed behind what was reused.

    Attributes:
        tensors: APPEND and WINDOW tensors over exactly those tokens.
        snapshots: STATE tensors by absolute length of the context after which they were taken.
    """

    start: int
    count: int
    tensors: Mapping[PartKind, Tensors] = field(default_factory=dict)
    snapshots: Mapping[int, Tensors] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + self.count


class Source(StrEnum):
    """Where the reused KV of a request came from."""

    COLD = "cold"
    SHARED = "shared"
    WARM = "warm"
    HOT = "hot"


class Fallback(StrEnum):
    """Why less was reused than the store's records promised."""

    CHECKSUM = "checksum"
    MISSING_BLOCK = "missing_block"
    FINGERPRINT = "fingerprint"
    FORMAT = "format"
    NOT_TRIMMABLE = "not_trimmable"
    LOAD_TIMEOUT = "load_timeout"
    QUARANTINED = "quarantined"


@dataclass(frozen=True)
class Reuse:
    """The prefix of a requested context whose KV need not be computed, loaded and verified.

    Attributes:
        length: tokens reused. `spans` cover [0, length) in order; the last may reach beyond it, and the engine cuts.
        hot_tokens: of the agent's own, found in RAM.
        warm_tokens: of the agent's own, read from disk for this request.
        shared_tokens: of other agents' blocks, wherever they were.
        bytes_loaded: bytes read from files for this request.
        fallback: why it is shorter than the records promised, if it is.
        seconds: time the load took.
    """

    length: int = 0
    spans: tuple[Span, ...] = ()
    hot_tokens: int = 0
    warm_tokens: int = 0
    shared_tokens: int = 0
    bytes_loaded: int = 0
    fallback: Fallback | None = None
    seconds: float = 0.0

    @property
    def source(self) -> Source:
        if self.warm_tokens:
            return Source.WARM
        if self.hot_tokens:
            return Source.HOT
        return Source.SHARED if self.shared_tokens else Source.COLD
