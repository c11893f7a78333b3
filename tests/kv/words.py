"""A stand-in for the engine: KV whose every word is a function of the tokens up to its position.

So a word in the wrong place, of another context, or of another kind is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from warmkv_server.contract.kv import Growth, KVLayout, PartKind, Reuse, TensorSpec
from warmkv_server.kv.index.records import TokenIds

FULL = (
    TensorSpec("kv0.words", PartKind.APPEND, "uint32", (4, 2, 8), 4 * 2 * 8 * 4),
    TensorSpec("kv0.scales", PartKind.APPEND, "float16", (4, 2, 2), 4 * 2 * 2 * 2),
)
SLIDING = (TensorSpec("kv1.words", PartKind.WINDOW, "uint32", (2, 1, 4), 2 * 4 * 4),)
RECURRENT = (TensorSpec("state.0.0", PartKind.STATE, "float32", (1, 3, 5), 60),)

REQUIRED: dict[PartKind, Callable[[KVLayout, int], set[int]]] = {
    PartKind.APPEND: lambda _, length: set(range(length)),
    PartKind.WINDOW: lambda layout, length: set(range(max(length - layout.window, 0), length)),
}
"""The tokens whose words a request can't do without, by kind: what the engine would miss."""

LAYOUTS = {
    "append": KVLayout(FULL),
    "window": KVLayout((*FULL, *SLIDING), window=300),
    "small_window": KVLayout((*FULL, *SLIDING), window=100),
    "hybrid": KVLayout((*FULL, *RECURRENT)),
    "recurrent": KVLayout(RECURRENT),
    "everything": KVLayout((*FULL, *SLIDING, *RECURRENT), window=128),
}


def context(*pieces: int | Sequence[int]) -> TokenIds:
    """Tokens 0..n-1 for a number, the tokens themselves for a sequence, one after the other."""
    parts = [range(piece) if isinstance(piece, int) else piece for piece in pieces]
    return np.array([token for part in parts for token in part], np.int32)


def prefix_hashes(tokens: TokenIds) -> NDArray[np.uint64]:
    """Entry p is a hash of tokens[:p]; shape (tokens + 1,)."""
    return _prefix_hashes(tokens.tobytes())


@lru_cache(maxsize=64)
def _prefix_hashes(raw: bytes) -> NDArray[np.uint64]:
    value, found = 1469598103934665603, [1469598103934665603]
    for token in np.frombuffer(raw, np.int32).tolist():
        value = ((value ^ (token + 1)) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 29
        found.append(value)
    return np.array(found, np.uint64)


def _mixed(seeds: NDArray[np.uint64], shape: tuple[int, ...], name: str) -> NDArray[np.uint64]:
    """A value for each element: of its seed (broadcast against shape), its position and the tensor's name."""
    place = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    salt = np.uint64(sum(name.encode()) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    mixed = (seeds ^ salt) + place * np.uint64(0x2545F4914F6CDD1D)
    mixed ^= mixed >> np.uint64(31)
    return mixed * np.uint64(0xD6E8FEB86659FD93)


def expected(spec: TensorSpec, tokens: TokenIds, start: int, end: int) -> NDArray[Any]:
    """The tensor over tokens [start, end), or the snapshot after `end` tokens."""
    hashes = prefix_hashes(tokens[:end])
    if spec.kind == PartKind.STATE:
        values = _mixed(hashes[end : end + 1], spec.shape, spec.name)
    else:
        streams, heads, width = spec.shape
        seeds = hashes[start + 1 : end + 1][:, None]
        # Position within the tensor must not matter, only the token's position in the context.
        values = np.stack(
            [
                np.stack([_mixed(seeds, (1, width), f"{spec.name}{stream}.{head}") for head in range(heads)])
                for stream in range(streams)
            ]
        )
    item = np.dtype(spec.dtype).itemsize
    narrow = np.ascontiguousarray(values.astype({2: np.uint16, 4: np.uint32}[item]))
    return narrow.view(spec.dtype)


def made(spec: TensorSpec, tokens: TokenIds, start: int, end: int) -> mx.array:
    array = mx.array(expected(spec, tokens, start, end))
    mx.eval(array)
    return array


def grow(layout: KVLayout, tokens: TokenIds, start: int, snapshots: Sequence[int] = ()) -> Growth | None:
    """What the engine would have computed for tokens[start:]."""
    end = len(tokens)
    if start == end:
        return None
    tensors = {
        kind: {spec.name: made(spec, tokens, start, end) for spec in layout.of_kind(kind)}
        for kind in dict.fromkeys(spec.kind for spec in layout.tensors)
        if kind != PartKind.STATE
    }
    states = {
        length: {spec.name: made(spec, tokens, 0, length) for spec in layout.of_kind(PartKind.STATE)}
        for length in {*snapshots, end}
        if layout.has_state and start < length <= end
    }
    return Growth(start, end - start, tensors, states)


def check(layout: KVLayout, tokens: TokenIds, reuse: Reuse) -> None:
    """Every word that the store handed out is the one that belongs there, and none is lacking."""
    assert reuse.length <= len(tokens)
    if not reuse.length:
        return
    spans = [span for span in reuse.spans if span.count]
    assert spans[0].start == 0
    assert all(a.end == b.start for a, b in pairwise(spans))
    assert spans[-1].start < reuse.length <= spans[-1].end
    assert reuse.hot_tokens + reuse.warm_tokens + reuse.shared_tokens == reuse.length
    for kind in {spec.kind for spec in layout.tensors} - {PartKind.STATE}:
        covered: set[int] = set()
        for span in spans:
            end = min(span.end, reuse.length)
            if kind not in span.parts:
                continue
            covered |= set(range(span.start, end))
            for spec in layout.of_kind(kind):
                got = np.array(span.parts[kind][spec.name])[:, :, : end - span.start]
                want = expected(spec, tokens, span.start, end)
                assert got.tobytes() == want.tobytes(), f"wrong words of {spec.name} in [{span.start}, {end})"
        assert covered >= REQUIRED[kind](layout, reuse.length), f"a gap in {kind}"
    if layout.has_state:
        last = reuse.spans[-1]
        assert last.end == reuse.length
        for spec in layout.of_kind(PartKind.STATE):
            got = np.array(last.parts[PartKind.STATE][spec.name])
            assert got.tobytes() == expected(spec, tokens, 0, reuse.length).tobytes(), "wrong snapshot"
