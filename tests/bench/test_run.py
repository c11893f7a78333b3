"""A whole run: its files, its end before its time, and its continuation."""

from __future__ import annotations

import asyncio
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.matrices import SMALL, measured
from tests.bench.scripted import ScriptedServer, serving
from warmkv_bench.config import ConfigError, Isolation, MatrixConfig, Mode, State
from warmkv_bench.options import ServerChoice
from warmkv_bench.results import Results
from warmkv_bench.rounds import Outcome
from warmkv_bench.run import run_matrix
from warmkv_bench.spawn import ServerFailed
from warmkv_bench.terminal import Terminal


class Watched(Terminal):
    """Tells when the first round has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.round_ended = asyncio.Event()

    def ended(self, predicted_s: float, actual_s: float, outcome: Outcome) -> None:
        super().ended(predicted_s, actual_s, outcome)
        self.round_ended.set()


async def run(
    address: str, folder: Path, config: MatrixConfig = SMALL, terminal: Terminal | None = None, **options: bool
) -> bool:
    chosen = {"resume": False, "dry_run": False} | options
    return await run_matrix(config, ServerChoice(address, None), folder, terminal or Terminal(), **chosen)


async def test_a_run_writes_samples_tables_and_plots(tmp_path: Path) -> None:
    await measured(tmp_path, modes=tuple(Mode), batch_sizes=(1, 2), runs=2)
    data = json.loads((tmp_path / "results.json").read_text())
    assert {"schema_version", "environment", "config", "samples", "summary", "predictions"} <= data.keys()
    sample = data["samples"][0]
    assert sample.keys() >= {
        "context_tokens",
        "state",
        "mode",
        "batch_size",
        "run",
        "ttft_ms",
        "e2e_ms",
        "output_tokens",
        "verified",
        "invalid_reason",
    }
    with (tmp_path / "samples.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(data["samples"])
    report = (tmp_path / "report.md").read_text()
    for plot in ("ttft.svg", "throughput.svg", "memory.svg", "run-time.svg"):
        assert plot in report
        assert (tmp_path / plot).read_text().startswith("<?xml")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "src=" not in page


async def test_streamed_samples_have_gaps_and_final_ones_do_not(tmp_path: Path) -> None:
    _, results = await measured(tmp_path, modes=tuple(Mode))
    for sample in results.samples:
        assert sample.e2e_ms is not None
        if sample.mode == Mode.STREAMING:
            assert sample.ttft_ms is not None
            assert sample.ttft_ms <= sample.e2e_ms
            assert len(sample.token_times_ms) == sample.output_tokens == 8
        else:
            assert (sample.ttft_ms, sample.itl_ms, sample.tpot_ms) == (None, None, None)


async def test_repeats_are_samples_of_one_run(tmp_path: Path) -> None:
    good, results = await measured(tmp_path, repeats=3, batch_sizes=(2,))
    assert good
    for state, count in ((State.COLD, 1), (State.WARM, 3), (State.HOT, 3)):
        for context in SMALL.contexts:
            found = [s for s in results.samples if (s.state, s.context_tokens, s.batch_index) == (state, context, 1)]
            assert [sample.repeat for sample in found] == list(range(1, count + 1))
    hot_by_warm = [ratio for ratio in results.summary["ratios"] if ratio["numerator"] == State.HOT]
    assert [ratio["n"] for ratio in hot_by_warm] == [2, 2]  # pairs of medians: one for each place in the batch


async def test_a_page_cache_that_cannot_be_seen_is_labelled(tmp_path: Path) -> None:
    good, results = await measured(tmp_path, states=(State.COLD, State.WARM_DROPPED, State.HOT))
    assert good
    assert {sample.page_cache for sample in results.samples if sample.state == State.WARM_DROPPED} == {"not controlled"}
    assert "warm-dropped (page cache not controlled)" in (tmp_path / "report.md").read_text()


async def test_nothing_is_left_on_the_server(tmp_path: Path) -> None:
    servicer = ScriptedServer()
    await measured(tmp_path, servicer=servicer)
    await measured(tmp_path, servicer=servicer, isolation=Isolation.STRICT)
    assert servicer.agents == {}


async def test_fork_and_strict_isolation_are_compared(tmp_path: Path) -> None:
    _, results = await measured(tmp_path, cross_check=True)
    assert {row["state"] for row in results.summary["cross_check"]} == {State.WARM, State.HOT}
    # The matrix itself is not mixed with the samples of the cross-check.
    assert sum(sample.purpose == "matrix" for sample in results.samples) == 6


async def test_the_prediction_is_near_the_actual_time(tmp_path: Path) -> None:
    """As near as it can be where the machine may be busy now and idle then: what is left out or counted twice shows."""
    servicer = ScriptedServer(seconds_per_token=5e-4)
    _, results = await measured(tmp_path, servicer=servicer, contexts=(256, 2048), runs=2)
    assert results.predictions["error"] == pytest.approx(0, abs=0.25)


async def test_a_dry_run_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(ScriptedServer()) as address:
        assert await run(address, tmp_path / "out", dry_run=True)
    assert "Plan" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


async def test_a_run_stops_before_its_time_is_passed(tmp_path: Path) -> None:
    servicer = ScriptedServer(seconds_per_token=1e-3)  # four seconds for the longer context
    good, results = await measured(tmp_path, servicer=servicer, contexts=(64, 4096), max_time_s=3.0)
    assert good
    assert results.status == "out of time"
    assert {sample.context_tokens for sample in results.samples} == {64}


async def test_an_interrupted_run_leaves_a_valid_report_and_can_be_resumed(tmp_path: Path) -> None:
    servicer = ScriptedServer(seconds_per_token=5e-4)
    config = replace(SMALL, contexts=(64, 2048))
    async with serving(servicer) as address:
        terminal = Watched()
        task = asyncio.create_task(run(address, tmp_path, config, terminal))
        await asyncio.wait_for(terminal.round_ended.wait(), 120)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        first = Results.read(tmp_path)
        assert first.status == "interrupted"
        assert {sample.context_tokens for sample in first.samples} == {64}
        assert "interrupted" in (tmp_path / "report.md").read_text()
        assert servicer.agents == {}

        assert await run(address, tmp_path, config, resume=True)
    second = Results.read(tmp_path)
    assert second.status == "complete"
    assert second.samples[: len(first.samples)] == first.samples
    assert len(second.samples) == 6


async def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    async with serving(ScriptedServer()) as address:
        await run(address, tmp_path)
        with pytest.raises(ConfigError, match="other options"):
            await run(address, tmp_path, replace(SMALL, runs=3), resume=True)


async def test_a_restart_needs_a_server_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --target"):
        await run("127.0.0.1:1", tmp_path, replace(SMALL, states=(State.RESTART,)))


async def test_a_context_beyond_the_limit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    async with serving(ScriptedServer()) as address:
        with pytest.raises(ConfigError, match="limit is 32768"):
            await run(address, tmp_path, replace(SMALL, contexts=(64, 40000)))


async def test_no_server_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmkv_bench.target.CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(ServerFailed, match=r"no server answers at 127\.0\.0\.1:1"):
        await run("127.0.0.1:1", tmp_path)
