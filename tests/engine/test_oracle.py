"""Without quantisation the engine says what mlx-lm says."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step

from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES, VOCAB
from tests.engine.runs import CHUNK, Outcome, Solo, job_of, outcomes, prompt_of, running
from tests.engine.spans import distance
from warmkv_server.engine.cache.codecs.choose import codecs_for

ROUNDING = 1e-4
"""The largest difference of a log-probability that batching may make, in 32 bits."""

PROMPTS = [prompt_of(1), prompt_of(60, seed=1), prompt_of(64, seed=2)]
ANSWER = 5


Oracle = list[tuple[int, mx.array]]
"""Of each step, the token and the log-probabilities of all tokens."""


def check(got: Outcome, oracle: Oracle) -> None:
    """Fail unless log-probabilities are equal to rounding, and tokens where the best two lie farther apart than it."""
    assert len(oracle) == len(got.tokens) == ANSWER
    for step, (token, logprobs) in zip(got.logprobs, oracle, strict=True):
        reported = mx.zeros(VOCAB)
        reported[mx.array([token for token, _ in step.top])] = mx.array([logprob for _, logprob in step.top])
        assert distance(reported, logprobs) < ROUNDING
        if step.token_id != token:
            ranked = mx.sort(logprobs)
            margin = distance(ranked[-1], ranked[-2])
            assert margin < 2 * ROUNDING, f"{step.token_id} is not {token}, which leads by {margin}"
            return


def generated_one_by_one(model: Any) -> list[Oracle]:
    return [
        [
            (int(token), logprobs)
            for token, logprobs in generate_step(mx.array(prompt), model, max_tokens=ANSWER, prefill_step_size=CHUNK)
        ]
        for prompt in PROMPTS
    ]


def generated_in_a_batch(model: Any) -> list[Oracle]:
    batch = BatchGenerator(model, max_tokens=ANSWER)
    oracle: dict[int, Oracle] = {ident: [] for ident in batch.insert(PROMPTS)}
    while any(len(steps) < ANSWER for steps in oracle.values()):
        for response in batch.next_generated():
            oracle[response.uid].append((response.token, response.logprobs))
    batch.close()
    return list(oracle.values())


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_batch_says_what_mlx_lm_says(name: str, folder_of: FolderOf) -> None:
    async with running(folder_of(name), kv_bits=0) as engine:
        got = await outcomes(engine, [job_of(prompt, ANSWER, top_logprobs=VOCAB) for prompt in PROMPTS])
    model = Solo(folder_of(name), codecs_for(0)).loaded.model
    oracles = [generated_one_by_one(model)]
    if name != "llama4_chunked":  # mlx-lm can't batch its caches
        oracles.append(generated_in_a_batch(model))
    for oracle in oracles:
        for each, steps in zip(got, oracle, strict=True):
            check(each, steps)
