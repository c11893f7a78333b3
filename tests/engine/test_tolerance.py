"""How near a context of which a part was decoded is to the same context computed at once, for each number of KV bits.

Decoding computes a row at a time where a prefill computes many, and sums round differently: in 32 bits by about one
part in a million. Unquantised KV differs by as much. Quantised KV is equal word for word, but for the few values that
rounding takes across the edge between two words; such a value is off by a whole step, a fifteenth of its group's range
with 4 bits and a 255th with 8. What that does to the next token's distribution depends on what attends to the value, so
it is bounded as a distribution: docs/quality.md states these bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import pytest

from tests.engine.runs import Solo, outcome, outcomes, running
from tests.engine.spans import filled, grown, needed
from warmkv_evaluation.windows import read_text
from warmkv_server.contract.generation import Answer, Job
from warmkv_server.contract.kv import Growth
from warmkv_server.engine.cache.codec import Codec

CASES = 24
DECODED = 30
TOGETHER = 4
NEAR = 0.01
"""A difference of log-probabilities; a hundredth changes a probability by one percent of itself."""


@dataclass(frozen=True)
class Bound:
    """
    Attributes:
        near: so many of the cases at least are within NEAR.
        most: no case differs by more.
        words: so large a share of the stored words at least is equal, in every case and every tensor.
    """

    near: int
    most: float
    words: float


BOUNDS = {0: Bound(CASES, 1e-3, 0.0), 8: Bound(17, 0.06, 0.98), 4: Bound(17, 1.0, 0.98)}
"""With 4 bits, what was seen at most on any CPU. A step of 8 bits is 17 times smaller, and so is what a flipped word
moves. Without words there is rounding alone."""


@pytest.mark.parametrize("bits", BOUNDS)
async def test_a_decoded_context_is_near_to_one_that_was_computed_at_once(bits: int) -> None:
    solo = Solo("builtin:tiny", Codec(bits))
    text = solo.loaded.tokenizer.encode(read_text(None)[:60_000])
    differences, shares = [], []
    async with running("builtin:tiny", kv_bits=bits, prefill_chunk=0) as engine:
        prompts = [text[case * 500 : case * 500 + 20 + 13 * case] for case in range(CASES)]
        for group in range(0, CASES, TOGETHER):
            together = prompts[group : group + TOGETHER]
            answer = Answer(max_tokens=DECODED, ignore_eos=True)
            answered = await outcomes(engine, [Job(prompt, answer=answer) for prompt in together])
            for prompt, each in zip(together, answered, strict=True):
                decoded, tokens = each.finished.growth, [*prompt, *each.tokens]
                at_once = (await outcome(engine.submit(Job(tokens[: decoded.end])))).finished.growth
                one, other = (_next(solo, growth, tokens[-1]) for growth in (decoded, at_once))
                differences.append(cast(float, mx.max(mx.abs(one - other)).item()))
                shares += _equal_words(decoded, at_once) if bits else []
    bound = BOUNDS[bits]
    assert sum(each <= NEAR for each in differences) >= bound.near, sorted(differences)
    assert max(differences) <= bound.most, sorted(differences)
    assert min(shares, default=1.0) >= bound.words, sorted(shares)[:5]


def _next(solo: Solo, growth: Growth, token: int) -> mx.array:
    """Log-probabilities of what follows this token behind this KV, (vocabulary,)."""
    loaded = solo.loaded
    spans = needed(grown([growth], growth.end), loaded.cache_map.layout, growth.end)
    caches = filled(loaded.model, loaded.cache_map, spans, growth.end)
    logits: mx.array = loaded.model(mx.array([[token]]), cache=caches)[0, -1].astype(mx.float32)
    return logits - mx.logsumexp(logits)


def _equal_words(one: Growth, other: Growth) -> list[float]:
    """The share of equal words in each tensor."""
    return [
        cast(float, mx.mean(array == other.tensors[kind][name]).item())
        for kind, tensors in one.tensors.items()
        for name, array in tensors.items()
        if "words" in name
    ]
