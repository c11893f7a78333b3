"""Whether the codec that was asked for does for a model: found out on what the model computes of a short text.

The keys of some models, Qwen2's for one, have a few values that are far from the others and the same for all tokens, or
nearly. They stretch the scale that their group shares, until what tells one token's key from another's is less than a
step of it. Such a model gets a finer codec.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import mlx.core as mx

from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.codecs.affine import AffineCodec
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.codec import KEYS, VALUES, Codec, CodecPlan, Stream
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.engine.model.step_plan import StepPlan, Wanted

log = logging.getLogger(__name__)

TEXT = (
    "The harbour master wrote down every ship that came in before noon: its name, its flag, how many crates it "
    "carried and for whom. In the evening she read the list aloud, and whoever had been waiting for oil, paper or "
    "seven bags of salt went home knowing when to come back. What did she write on the day of the storm?"
)
TOKENS = 64

MOST_LOST = 0.5
"""Of what tells tokens apart, as a share of its variance, in any stream. At 4 bits ordinary models lose a hundredth to
a fifth; those that this is about lose several times all of it."""
GOOD = 0.05
"""What the finer codec may lose of a stream. One that loses more is kept as it is computed."""


def refined(runner: ModelRunner, codecs: CodecPlan, tokens: Sequence[int]) -> CodecPlan:
    """The same plan, or a finer one, and then the log says so.

    Args:
        tokens: of `TEXT`; of fewer than three nothing is to be learned.
    """
    if not codecs.bits or len(tokens) < 3:
        return codecs
    caches = kinds.empty_caches(runner.model, CodecPlan(AsComputed()))
    runner.probe(StepPlan.probe(tokens, wanted=Wanted.NOTHING), caches)
    streams = dict(_streams(caches))
    lost = {stream: _lost(codecs.of_stream(stream), computed) for stream, computed in streams.items()}
    worst = [stream for stream in streams if lost[stream] > MOST_LOST]
    if not worst:
        return codecs
    finer = AffineCodec(8, codecs.group_size)
    exact = [stream for stream, computed in streams.items() if _lost(finer, computed) > GOOD]
    log.warning(
        "%d bits don't do for this model: they lose what tells tokens apart in the %s; %s",
        codecs.bits,
        _named(worst),
        f"all is kept at 8 bits instead, and as it is computed the {_named(exact)}"
        if exact
        else "all is kept at 8 bits instead",
    )
    return CodecPlan(finer, dict.fromkeys(exact, AsComputed()))


def _named(streams: Sequence[Stream]) -> str:
    return ", ".join(f"{'keys' if side == KEYS else 'values'} of cache {leaf}" for leaf, side in streams)


def _streams(caches: Sequence[object]) -> Iterator[tuple[Stream, mx.array]]:
    for number, leaf in kinds.token_leaves(caches).items():
        if leaf.log:
            for side, words in zip((KEYS, VALUES), leaf.take(), strict=True):
                yield (number, side), words[0]


def _lost(codec: Codec, computed: mx.array) -> float:
    """Of the head for which it is worst.

    Args:
        computed: (1, kv_heads, tokens, head_dim).
    """
    x = computed[:, :, 1:]  # the first token's are unlike all others', and have scales of their own
    read = codec.decode(codec.encode(x, 1), x.dtype, 1)
    x, read = x.astype(mx.float32), read.astype(mx.float32)
    variance = mx.square(x - x.mean(axis=2, keepdims=True)).sum(axis=(0, 2, 3))
    error = mx.square(read - x).sum(axis=(0, 2, 3))
    # Where all tokens have the same there is nothing to lose.
    differs = variance > 1e-6 * mx.square(x).sum(axis=(0, 2, 3))
    return float(mx.where(differs, error / mx.maximum(variance, 1e-30), 0).max())
