"""The model is called in one place, and every call is a value that says what it does."""

from __future__ import annotations

import ast
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

import warmkv_server.engine
from tests.engine import families
from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES
from tests.engine.runs import CHUNK, FEW_SHAPES, Solo, job_of, outcome, outcomes, prompt_of, running
from tests.engine.spans import equal
from warmkv_server.engine.cache.caches import empty_caches
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.model import discover
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.engine.model.step_plan import Row, StepKind, StepPlan, Wanted

ENGINE = Path(warmkv_server.engine.__file__).parent
RUNNER = ENGINE / "model/runner.py"
BELOW_THE_PLANNER = [ENGINE / "steps/batch.py", RUNNER, ENGINE / "model/step_plan.py", *ENGINE.glob("cache/**/*.py")]


def calls_of_a_model(file: Path) -> Iterator[str]:
    """Those of what is called a model, and those that are given caches as mlx-lm's models are."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("model", "_model") or any(given.arg == "cache" for given in node.keywords):
                yield f"{file.relative_to(ENGINE)}: {ast.unparse(node)}"


def imported(file: Path) -> set[str]:
    """Top-level names of what a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_one_file_calls_the_model() -> None:
    assert list(calls_of_a_model(RUNNER))
    assert [call for file in ENGINE.rglob("*.py") if file != RUNNER for call in calls_of_a_model(file)] == []


def test_a_plan_needs_no_mlx_and_nothing_that_carries_one_out_reads_a_clock() -> None:
    assert "mlx" not in imported(ENGINE / "model/step_plan.py")
    assert len(BELOW_THE_PLANNER) > 5
    assert [file for file in BELOW_THE_PLANNER if imported(file) & {"time", "datetime"}] == []


async def test_every_call_comes_from_there(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """At load, alone, in a batch, and to check a guess."""
    call, callers, kinds = llama.Model.__call__, set(), set()

    def noted(self: Any, inputs: mx.array, *rest: Any, **options: Any) -> Any:
        callers.add(sys._getframe(1).f_code.co_filename)
        kinds.add((min(inputs.shape[0], 2), min(inputs.shape[1], 2)))
        return call(self, inputs, *rest, **options)

    monkeypatch.setattr(llama.Model, "__call__", noted)
    async with running(folder_of("llama"), speculate_tokens=4) as engine:
        await outcome(engine.submit(job_of([9, 10, 11, 12] * 10, 30)))
        await outcomes(engine, [job_of(prompt_of(20, seed), 5) for seed in range(2)])
    assert kinds == {(1, 1), (1, 2), (2, 1)}
    assert callers == {str(RUNNER)}


def logged(caplog: pytest.LogCaptureFixture) -> list[StepPlan]:
    """The plans in the log."""
    return [
        plan
        for record in caplog.records
        if record.name == "warmkv_server.engine.model.runner" and isinstance(record.args, tuple)
        for plan in record.args
        if isinstance(plan, StepPlan) and plan.kind is not StepKind.PROBE
    ]


def carried(plan: StepPlan) -> StepPlan:
    """What arrives elsewhere."""
    told = json.loads(json.dumps(asdict(plan)))
    rows = tuple(Row(ident, start, tokens and tuple(tokens)) for ident, start, tokens in told["rows"])
    return StepPlan(StepKind(told["kind"]), rows, told["fed"], told["read"], Wanted(told["wanted"]))


async def test_plans_alone_give_the_answer_elsewhere(folder_of: FolderOf, caplog: pytest.LogCaptureFixture) -> None:
    """To whoever has the model and caches of its own: the same steps, bit for bit."""
    caplog.set_level(logging.DEBUG, "warmkv_server.engine.model.runner")
    prompt = prompt_of(2 * CHUNK + 9)
    async with running(folder_of("gemma3_text")) as engine:
        got = await outcome(engine.submit(job_of(prompt, 6, top_logprobs=320)))
    plans = logged(caplog)
    assert [carried(plan) for plan in plans] == plans
    assert [plan.kind for plan in plans] == 3 * [StepKind.PREFILL] + 7 * [StepKind.DECODE]

    loaded = Solo(folder_of("gemma3_text")).loaded
    caches = loaded.cache_map.empty_caches(loaded.model)
    tokens: list[int] = []
    reported = []
    for plan in map(carried, plans):
        if plan.kind is StepKind.PREFILL:
            loaded.runner.prefill(plan, caches)
            continue
        logits = loaded.runner.decode(plan, caches, None if plan.rows[0].tokens else mx.array(tokens[-1:]))
        tokens.append(int(mx.argmax(logits).item()))  # type: ignore[arg-type]
        reported.append((logits - mx.logsumexp(logits))[0])
    assert tokens[:6] == got.tokens
    for step, logprobs in zip(got.logprobs, reported, strict=False):
        assert dict(step.top) == dict(enumerate(logprobs.tolist()))  # type: ignore[arg-type]


async def test_a_plan_says_what_a_step_does(folder_of: FolderOf, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "warmkv_server.engine.model.runner")
    prompts = [prompt_of(length, length) for length in (20, 20, CHUNK + 2)]
    async with running(folder_of("llama"), max_decode_gap_ms=60_000) as engine:
        handles = [engine.submit(job_of(prompt, 4)) for prompt in prompts]
        for handle in handles:
            await outcome(handle)
    plans = logged(caplog)
    for ident, prompt in enumerate(prompts):
        own = [(plan, row) for plan in plans for row in plan.rows if row.ident == ident]
        place = 0
        for plan, row in own:
            assert row.start == place
            assert (plan.fed, plan.read) == (row.length, max(each.start for each in plan.rows) + plan.fed)
            assert row.tokens is None or list(row.tokens) == prompt[place : place + row.length]
            assert plan.wanted is (Wanted.NOTHING if plan.kind is StepKind.PREFILL else Wanted.LOGITS)
            place += row.length
        assert place >= len(prompt) + 3
    together = [plan for plan in plans if len(plan.rows) > 1]
    assert together
    assert all(plan.kind is StepKind.DECODE for plan in together)


async def test_a_plan_says_what_is_padded(
    folder_of: FolderOf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discover, "attention_shapes", lambda *_: FEW_SHAPES)
    async with running(folder_of("llama"), max_decode_gap_ms=60_000) as engine:
        caplog.set_level(logging.DEBUG, "warmkv_server.engine.model.runner")
        await outcomes(engine, [job_of(prompt_of(length), 4) for length in (60, 52)])
    plans = logged(caplog)
    chunks = {(row.start, row.length): plan for plan in plans if plan.kind is StepKind.PREFILL for row in plan.rows}
    assert (chunks[32, 27].fed, chunks[32, 27].read) == (32, 64)
    both = {max(row.start for row in plan.rows): plan for plan in plans if len(plan.rows) == 2}
    assert (both[60].fed, both[60].read) == (2, 64)
    assert (both[63].fed, both[63].read) == (2, 128)


def test_a_plan_is_one_line_in_the_log() -> None:
    rows = (Row(3, 20, (7, 8, 9)), Row(5, 20, (7, 8)))
    plan = StepPlan(StepKind.PREFILL, rows, fed=8, read=64, wanted=Wanted.NOTHING)
    assert str(plan) == "prefill of #3 20+3, #5 20+2; 8 fed a row, 64 read, nothing wanted"
    step = StepPlan(StepKind.DECODE, (Row(3, 23),), fed=1, read=24, wanted=Wanted.LOGITS)
    assert str(step) == "decode of #3 23+1; 1 fed a row, 24 read, logits wanted"


async def test_guesses_are_in_the_plan(folder_of: FolderOf, caplog: pytest.LogCaptureFixture) -> None:
    async with running(folder_of("llama"), speculate_tokens=4) as engine:
        caplog.set_level(logging.DEBUG, "warmkv_server.engine.model.runner")
        await outcome(engine.submit(job_of([9, 10, 11, 12] * 10, 30)))
    checks = [plan for plan in logged(caplog) if plan.kind is StepKind.VERIFY]
    assert checks
    for plan in checks:
        assert plan.fed == plan.rows[0].length > 1
        assert plan.read == plan.rows[0].start + plan.fed


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_are_what_logits_are_made_of(name: str) -> None:
    runner = ModelRunner(families.build(name))
    tokens = prompt_of(11)

    def probe(wanted: Wanted) -> mx.array:
        caches = empty_caches(runner.model, codecs_for(0))
        return runner.probe(StepPlan.probe(tokens, wanted=wanted), caches)

    hidden, logits = probe(Wanted.HIDDEN), probe(Wanted.LOGITS)
    config = FAMILIES[name].config
    assert hidden.shape == (1, 11, config.get("text_config", config)["hidden_size"])
    assert logits.shape[:2] == (1, 11)
    if name in ("llama", "mamba2", "mixtral", "gpt_oss_sinks"):  # their heads are one product
        assert equal(runner.model.lm_head(hidden), logits)


def test_a_class_without_hidden_states_is_told_so() -> None:
    model = families.build("llama")
    model.inside = model.pop("model")
    with pytest.raises(LookupError, match=r"mlx_lm.models.llama has no part"):
        ModelRunner(model).probe(StepPlan.probe([1], wanted=Wanted.HIDDEN), [])
