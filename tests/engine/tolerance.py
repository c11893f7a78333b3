"""Measures how far a context whose end was decoded is from the same context computed at once; prints it as JSON.

A program of its own, because a served model computes with the BLAS that the server loads before anything imports MLX.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast

from warmkv_server.engine.model.device import prepare  # first: it loads the BLAS

# isort: split
import mlx.core as mx

from tests.engine.runs import Solo, outcome, outcomes, running
from tests.engine.spans import filled, grown, needed
from warmkv_evaluation.windows import read_text
from warmkv_server.contract.generation import Answer, Job
from warmkv_server.contract.kv import Growth
from warmkv_server.engine.cache.codecs.choose import codecs_for

CASES = 24
DECODED = 30
TOGETHER = 4


async def measure(bits: int) -> dict[str, list[float]]:
    """
    Returns:
        differences: for each case, the largest between the log-probabilities of the next token.
        shares: of equal words in each tensor.
    """
    solo = Solo("builtin:tiny", codecs_for(bits))
    text = solo.loaded.tokenizer.encode(read_text(None)[:60_000])
    prompts = [text[case * 500 : case * 500 + 20 + 23 * case] for case in range(CASES)]
    answer = Answer(max_tokens=DECODED, ignore_eos=True)
    differences: list[float] = []
    shares: list[float] = []
    async with running("builtin:tiny", kv_bits=bits, prefill_chunk=0) as engine:
        for group in range(0, CASES, TOGETHER):
            together = prompts[group : group + TOGETHER]
            answered = await outcomes(engine, [Job(prompt, answer=answer) for prompt in together])
            for prompt, each in zip(together, answered, strict=True):
                decoded, tokens = each.finished.growth, [*prompt, *each.tokens]
                at_once = (await outcome(engine.submit(Job(tokens[: decoded.end])))).finished.growth
                one, other = (_next(solo, growth, tokens[-1]) for growth in (decoded, at_once))
                differences.append(cast(float, mx.max(mx.abs(one - other)).item()))
                shares += _equal_words(decoded, at_once) if bits else []
    return {"differences": sorted(differences), "shares": sorted(shares)}


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


if __name__ == "__main__":
    prepare()
    print(json.dumps(asyncio.run(measure(int(sys.argv[1])))))
