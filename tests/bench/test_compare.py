"""Two runs side by side, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from warmkv_bench.cli import app
from warmkv_bench.compare import changes, differences
from warmkv_bench.config import MatrixConfig
from warmkv_bench.results import Results, ResultsError, Sample

ENVIRONMENT = {
    "time": "2026-11-23T12:00:00+00:00",
    "machine": {"processor": "p", "cores": 2, "data_filesystem": "ext4"},
    "server": {"device": "cpu", "blas": "mkl", "fingerprint": "f", "durability": "DURABILITY_FULL"},
}


def results(ttfts_ms: list[float], context: int = 1024) -> Results:
    samples = [
        Sample(
            context_tokens=context,
            prefix_tokens=context,
            suffix_tokens=32,
            state="warm",
            mode="streaming",
            batch_size=1,
            batch_index=0,
            run=run,
            isolation="fork",
            purpose="matrix",
            round_key=f"r{run}",
            ttft_ms=ttft_ms,
            verified=True,
        )
        for run, ttft_ms in enumerate(ttfts_ms, 1)
    ]
    return Results(ENVIRONMENT, MatrixConfig(contexts=(context,)), "id", samples)


STEADY = [100.0, 101.0, 99.0, 100.5, 99.5]


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ([120.0, 121.0, 119.0, 120.5, 119.5], "slower"),
        ([80.0, 81.0, 79.0, 80.5, 79.5], "faster"),
        ([100.2, 101.1, 99.3, 100.4, 99.8], "same"),
        ([95.0, 103.0, 130.0, 99.0, 140.0], "unclear"),
        ([200.0, 210.0], "slower"),
        ([100.0, 101.0], "too few samples"),
    ],
)
def test_the_verdict_on_a_group(new: list[float], verdict: str) -> None:
    (change,) = changes(results(STEADY), results(new), 0.05)
    assert change.verdict == verdict
    assert change.regressed == (verdict == "slower")


def test_a_group_that_is_gone_is_a_regression() -> None:
    (change,) = changes(results(STEADY), results(STEADY, context=2048), 0.05)
    assert (change.verdict, change.regressed) == ("missing", True)


def test_invalid_samples_are_not_compared() -> None:
    new = results([1000.0, *STEADY])
    new.samples[0].verified = False
    (change,) = changes(results(STEADY), new, 0.05)
    assert change.verdict == "same"


def test_another_machine_is_told() -> None:
    new = results(STEADY)
    new.environment = {**ENVIRONMENT, "machine": {**ENVIRONMENT["machine"], "cores": 8}}  # type: ignore[dict-item]
    assert differences(results(STEADY), new) == ["machine cores: 2 before, 8 now"]


def test_fail_if_slower_is_an_exit_code(tmp_path: Path) -> None:
    results(STEADY).write(tmp_path / "old")
    results([value * 1.2 for value in STEADY]).write(tmp_path / "new")
    arguments = ["compare", str(tmp_path / "old"), str(tmp_path / "new" / "results.json")]
    runner = CliRunner()
    assert runner.invoke(app, arguments).exit_code == 0
    assert runner.invoke(app, [*arguments, "--fail-if-slower", "10"]).exit_code == 1
    assert runner.invoke(app, [*arguments, "--fail-if-slower", "30"]).exit_code == 0


def test_results_survive_writing_and_reading(tmp_path: Path) -> None:
    written = results(STEADY)
    written.write(tmp_path)
    assert Results.read(tmp_path) == written


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 99}', "[1]"])
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsError, match=r"results\.json"):
        Results.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "1024,many"], "--contexts has 'many': it must be a whole number"),
        (["--states", "tepid"], "--states has 'tepid': it can be cold, warm, warm-dropped, hot, restart"),
        (["--target", "localhost"], "it must be HOST:PORT"),
        (["--target", "localhost:1", "--spawn"], "--target names a running server"),
        (["--runs", "0"], "--runs is 0: it must be at least 1"),
    ],
)
def test_a_wrong_option_ends_with_one_sentence(arguments: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, ["run", *arguments])
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.output
