"""`warmkv bench engine`: its arithmetic, and one run on the built-in model with mlx-lm beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from warmkv_bench.cli import app
from warmkv_bench.engine.outcome import (
    Comparison,
    Target,
    Verdict,
    alternating_rate,
    fair_share,
    gaps_after,
    p99_outcome,
    total_rate,
)


@pytest.mark.parametrize(
    ("target", "ratio", "interval", "expected"),
    [
        (Target(1.15), 1.0, (0.9, 1.1), Verdict.HOLDS),
        (Target(1.15), 1.1, (0.9, 1.2), Verdict.LIKELY),
        (Target(1.15), 1.2, (1.1, 1.3), Verdict.UNLIKELY),
        (Target(1.15), 1.3, (1.2, 1.4), Verdict.FAILS),
        (Target(0.95, at_least=True), 1.0, (0.96, 1.1), Verdict.HOLDS),
        (Target(0.95, at_least=True), 0.8, (0.7, 0.9), Verdict.FAILS),
        (Target(0.95, at_least=True), 0.96, None, Verdict.LIKELY),
    ],
)
def test_a_verdict_is_sure_only_where_the_whole_interval_agrees(
    target: Target, ratio: float, interval: tuple[float, float] | None, expected: Verdict
) -> None:
    assert target.verdict(ratio, interval) is expected


def test_slack_is_taken_off_our_time_before_it_is_judged() -> None:
    row = Comparison("hot", "m", "c", "ms", "other", [14.0] * 6, [10.0] * 6, Target(1.15, slack_ms=3.0)).outcome()
    assert (row["ratio"], row["verdict"]) == (1.4, Verdict.HOLDS)
    row = Comparison("hot", "m", "c", "ms", "other", [15.0] * 6, [10.0] * 6, Target(1.15, slack_ms=3.0)).outcome()
    assert row["verdict"] == Verdict.FAILS


def test_throughput_is_counted_only_while_all_streams_run() -> None:
    # The second begins at 100 ms, and the first ends at 300 ms: 4 and 2 tokens came in these 200 ms.
    assert total_rate([[0.0, 50.0, 150.0, 200.0, 250.0, 300.0], [100.0, 200.0, 300.0, 400.0]]) == pytest.approx(30.0)
    assert total_rate([[0.0, 10.0, 20.0]]) == pytest.approx(100.0)
    with pytest.raises(ValueError, match="never all running"):
        total_rate([[0.0, 1.0], [2.0, 3.0]])


def test_groups_in_turns_take_the_sum_of_their_steps() -> None:
    # 4 streams at 40 tokens/s: a step of 100 ms; one at 5: 200 ms. Together 5 tokens in 300 ms.
    assert alternating_rate([(4, 40.0), (1, 5.0)]) == pytest.approx(5 / 0.3)


def test_the_median_of_requests_served_in_order_waits_for_half_of_them() -> None:
    assert fair_share(10.0, 1) == 10.0
    assert fair_share(10.0, 8) == 45.0  # the mean of the 4th and the 5th


def test_gaps_that_overlap_the_prefill_count() -> None:
    assert gaps_after([[0.0, 10.0, 30.0, 60.0, 61.0]], 20.0, 50.0) == [(30.0, 20.0), (60.0, 30.0)]


def test_the_longest_hundredth_of_the_gaps_is_held_against_the_limit() -> None:
    assert p99_outcome("m", "c", [10.0] * 300, 20.0)["verdict"] == Verdict.HOLDS
    assert p99_outcome("m", "c", [10.0] * 200 + [30.0] * 100, 20.0)["verdict"] == Verdict.FAILS


def test_the_command_measures_both_sides_and_says_what_it_found(tmp_path: Path) -> None:
    arguments = ["engine", "--quick", "--runs", "1", "--contexts", "1024", "--models", "builtin:tiny"]
    done = CliRunner().invoke(app, [*arguments, "--only", "hot,streams,gap", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["comparison"], row["against"]): row for row in results["outcomes"]}
    assert {name for name, _ in rows} == {"hot", "streams", "gap"}
    assert len(rows) == 3 + 2 + 1
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows.values())
    assert rows["hot", "generate_step, same words"]["target"] == "≤ 1.15 + 3 ms"
    assert len(results["gaps"][0]["gaps"]) == 4
    assert (tmp_path / "gaps.svg").read_text().startswith("<?xml")
    assert "| hot |" in (tmp_path / "report.md").read_text()


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["engine", "--models", str(tmp_path), "-o", str(tmp_path)])
    assert done.exit_code == 2
    assert "no model at" in done.output
