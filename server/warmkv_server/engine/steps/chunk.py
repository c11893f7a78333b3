"""Computing the KV of a prompt, a chunk at a time."""

from __future__ import annotations

import mlx.core as mx

from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.attention_shapes import feed
from warmkv_server.engine.steps.sequence import Sequence


def next_boundary(sequence: Sequence, chunk: int) -> int:
    """Where the next chunk ends.

    Chunks end at multiples of `chunk`, which is a multiple of the block size, at the lengths where a snapshot is
    wanted, and at the end: never at a place that depends on where the reused prefix came from.
    """
    end = min((sequence.done // chunk + 1) * chunk, sequence.prefill_end)
    wanted = [length for length in sequence.job.snapshot_at if sequence.done < length < end]
    return min([end, *wanted])


def run_chunk(sequence: Sequence, chunk: int) -> None:
    """Compute one chunk. Its logits are never asked for, so they are never computed."""
    end = next_boundary(sequence, chunk)
    if end > sequence.done:
        loaded, tokens = sequence.loaded, sequence.to_prefill[sequence.done : end]
        feed(loaded.model, sequence.caches, [tokens], loaded.cache_map.shapes)
        mx.eval(kinds.arrays(sequence.caches))
        sequence.done = end
        sequence.collect()
        if end == sequence.prefill_end or end in sequence.job.snapshot_at:
            sequence.keep_snapshot(sequence.loaded.cache_map.snapshot(sequence.caches))


def choose_first(sequence: Sequence) -> None:
    """Feed the last token, alone, and sample the first token of the answer, or the next one, from its logits."""
    assert sequence.chooser is not None
    last = sequence.to_prefill[-1]
    logits = _step(sequence, last)
    fed = mx.array([last]) if sequence.completion else None
    sequence.pending = sequence.chooser.choose(logits[:, -1], sequence.done, fed)
    mx.eval(sequence.pending.arrays)
    sequence.collect()


def feed_last(sequence: Sequence) -> None:
    """Compute the KV of the last token of the answer."""
    _step(sequence, sequence.completion[-1])
    mx.eval(kinds.arrays(sequence.caches))
    sequence.collect()


def _step(sequence: Sequence, token: int) -> mx.array:
    """One step of a sequence that has its own caches: its logits, (1, 1, vocabulary), lazy."""
    logits: mx.array = sequence.loaded.model(mx.array([[token]]), cache=sequence.caches)
    sequence.done += 1
    return logits
