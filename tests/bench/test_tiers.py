"""`warmkv bench tiers` against a real server, and its arithmetic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from warmkv_bench.cli import app
from warmkv_bench.config import State
from warmkv_bench.tiers.cold_read import read_ms
from warmkv_bench.tiers.figures import figures
from warmkv_bench.tiers.pairs import TierSample


def test_pairs_are_proven(tmp_path: Path) -> None:
    command = ["tiers", "--contexts", "300,600", "--pairs", "2", "--dropped", "2", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "tiers.json").read_text())
    samples = results["samples"]
    assert len(samples) == 2 * (2 * 2 + 2)
    assert {sample["invalid_reason"] for sample in samples} == {None}
    for sample in samples:
        assert (sample["bytes_loaded"] > 0) == (sample["state"] != State.HOT)
        if sample["page_cache"] == "dropped":
            assert sample["cold_read_ms"] > 0
    assert [one["context_tokens"] for one in results["figures"]] == [300, 600]
    assert results["status"] == "complete"
    assert "limit: 1.15 hot + 5" in (tmp_path / "tiers.md").read_text()


def test_a_run_that_is_cut_off_leaves_the_sizes_that_it_has(tmp_path: Path) -> None:
    sizes = [str(size) for size in range(300, 350)]
    command = [sys.executable, "-m", "warmkv_bench", "tiers", "--contexts", ",".join(sizes), "--pairs", "1"]
    command += ["--dropped", "0", "--output", str(tmp_path)]
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests themselves are to ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=unbuffered, text=True, preexec_fn=heard) as bench:
        assert bench.stdout is not None
        said = next(line for line in bench.stdout if line.startswith("301 tokens"))  # 300 is written by now
        bench.send_signal(signal.SIGINT)
        said += bench.stdout.read()
    assert bench.returncode == 130, said
    assert "what was measured is in" in said
    results = json.loads((tmp_path / "tiers.json").read_text())
    measured = [one["context_tokens"] for one in results["figures"]]
    assert 1 <= len(measured) < len(sizes)
    assert measured == [int(size) for size in sizes[: len(measured)]]
    assert [sample["context_tokens"] for sample in results["samples"]] == sorted(2 * measured)
    assert results["status"] == "interrupted"
    assert f"interrupted: {len(measured)} of 50 sizes" in (tmp_path / "tiers.md").read_text()


def sample(state: State, ttft_ms: float, cold_read_ms: float | None = None, invalid: str | None = None) -> TierSample:
    page_cache = "dropped" if state == State.WARM_DROPPED else ""
    stages = {"first_token": ttft_ms, "load": 1.0}
    return TierSample(1024, state, 0, ttft_ms, 10, page_cache, stages, [1, 2], cold_read_ms, invalid)


def test_limits_are_of_medians_of_valid_samples() -> None:
    samples = [sample(State.HOT, ttft) for ttft in (90.0, 100.0, 400.0)]
    samples += [sample(State.WARM, ttft) for ttft in (110.0, 120.5, 130.0)]
    samples += [sample(State.WARM_DROPPED, ttft, 10.0) for ttft in (112.0, 114.0, 900.0)]
    samples.append(sample(State.WARM, 1.0, invalid="no"))
    (one,) = figures(samples)
    assert one.warm_limit == pytest.approx(1.15 * 100 + 5)
    assert one.dropped_limit == pytest.approx(100 + 1.3 * 10)
    assert one.invalid == 1
    assert one.misses == [
        "1,024 tokens warm: 120.5 ms, limit 120.0 ms",
        "1,024 tokens dropped: 114.0 ms, limit 113.0 ms",
    ]


def test_a_plain_read_takes_its_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert read_ms([tmp_path / "file"]) > 0
