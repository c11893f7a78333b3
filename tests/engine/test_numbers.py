"""Logits that aren't numbers, and ids that the tokenizer doesn't have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES, VOCAB
from tests.engine.folders import write_model
from tests.engine.runs import become, job_of, outcome, outcomes, prompt_of, running
from warmkv_server.contract.generation import Answer, Job, Sampling
from warmkv_server.engine.output.sampling import Choosable
from warmkv_server.errors import EngineError

BROKEN_TOKEN = 300
"""Wherever it is the last token, the model's logits are not numbers."""

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": Sampling(temperature=0.8, seed=1)},
    "reported": {"top_logprobs": 3},
    "penalised": {"sampling": Sampling(repetition_penalty=1.1)},
}


def breaking(values: float) -> Any:
    """For `become`: logits behind `BROKEN_TOKEN` are all of this value."""

    def subclass(real: type[Any]) -> type[Any]:
        def call(self: Any, inputs: mx.array, *rest: Any, **options: Any) -> Any:
            logits = real.__call__(self, inputs, *rest, **options)
            return mx.where((inputs == BROKEN_TOKEN)[..., None], mx.array(values, logits.dtype), logits)

        return type("Breaking", (real,), {"__call__": call})

    return subclass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("values", [float("nan"), float("inf"), -float("inf")])
async def test_they_are_an_error_and_the_engine_goes_on(
    values: float, way: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, breaking(values))
    async with running(folder_of("llama")) as engine:
        bad = job_of([*prompt_of(20), BROKEN_TOKEN], 4, **WAYS[way])
        with pytest.raises(EngineError):
            await outcome(engine.submit(bad))
        assert len((await outcome(engine.submit(job_of(prompt_of(20), 4)))).tokens) == 4


@pytest.mark.parametrize("way", WAYS)
async def test_in_a_batch_the_row_at_fault_fails_alone(
    way: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, breaking(float("nan")))
    good = [job_of(prompt_of(20 + n, seed=n), 12, **WAYS[way]) for n in range(3)]
    # It is made to say the token some steps into its answer, when it decodes together with the others.
    begun = Sampling(logit_bias={BROKEN_TOKEN: 100.0})
    bad = Job(prompt_of(21, seed=9), answer=Answer(max_tokens=12, ignore_eos=True, sampling=begun))
    async with running(folder_of("llama")) as engine:
        alone = [each.tokens for each in await outcomes(engine, good)]
        handles = [engine.submit(job) for job in [*good, bad]]
        ended = await asyncio.gather(*(outcome(handle) for handle in handles), return_exceptions=True)
    assert isinstance(ended[-1], EngineError)
    for each, tokens in zip(ended[:-1], alone, strict=True):
        assert not isinstance(each, BaseException)
        assert each.tokens == tokens


@pytest.mark.parametrize("way", WAYS)
async def test_padded_ids_are_never_sampled(way: str, tmp_path: Path) -> None:
    """The model likes a padded id best of all."""
    padded = 4096 + 200  # the tokenizer has 4096
    config = {**FAMILIES["llama"].config, "vocab_size": padded}
    weights = llama.Model(llama.ModelArgs.from_dict(config))
    weights.lm_head.weight[4096:] *= 100
    write_model(tmp_path / "model", config, weights)
    async with running(tmp_path / "model") as engine:
        done = await outcomes(engine, [job_of(prompt_of(20, seed=n), 8, **WAYS[way]) for n in range(2)])
    for each in done:
        assert len(each.tokens) == 8
        assert max(each.tokens) < 4096
        assert all(alternative < 4096 for report in each.logprobs for alternative, _ in report.top)


def test_holes_between_the_tokenizers_ids_are_not_chosen() -> None:
    choosable = Choosable([0, 1, 3], VOCAB)
    logits = mx.zeros((2, VOCAB))
    logits[:, 2], logits[:, 3], logits[:, 4] = 5.0, 1.0, 9.0
    assert mx.argmax(choosable(logits), axis=-1).tolist() == [3, 3]
