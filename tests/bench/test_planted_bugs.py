"""A server that does not do what it says is caught, whatever it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.matrices import measured
from tests.bench.scripted import Bug
from warmkv_bench.config import Isolation, Mode, State
from warmkv_bench.results import Results

BOTH = pytest.mark.parametrize("isolation", Isolation)


def reasons(results: Results, state: State) -> set[str]:
    """Why each sample of a state is invalid; "verified" for one that is not."""
    return {sample.invalid_reason or "verified" for sample in results.samples if sample.state == state}


@BOTH
async def test_an_honest_server_passes(tmp_path: Path, isolation: Isolation) -> None:
    good, results = await measured(tmp_path, isolation=isolation, modes=tuple(Mode), batch_sizes=(1, 2), runs=2)
    assert {sample.invalid_reason for sample in results.samples} == {None}
    assert good
    # contexts x states x modes x runs x requests of both batch sizes
    assert len(results.samples) == 2 * 3 * 2 * 2 * (1 + 2)


@BOTH
@pytest.mark.parametrize("bug", [Bug.EVICT_KEEPS, Bug.EVICT_PRETENDS, Bug.EVICT_PRETENDS_WARM])
async def test_an_eviction_that_does_nothing(tmp_path: Path, bug: Bug, isolation: Isolation) -> None:
    good, results = await measured(tmp_path, bug, isolation=isolation)
    assert not good
    assert "verified" not in reasons(results, State.WARM)
    assert reasons(results, State.HOT) == {"verified"}


async def test_an_eviction_that_only_says_warm_is_betrayed_by_the_bytes(tmp_path: Path) -> None:
    _, results = await measured(tmp_path, Bug.EVICT_PRETENDS_WARM)
    assert all("bytes_loaded is 0" in reason for reason in reasons(results, State.WARM))


@pytest.mark.parametrize("bug", [Bug.PRIME_FORGETS, Bug.PRIME_CUTS])
async def test_a_prime_that_silently_fails(tmp_path: Path, bug: Bug) -> None:
    good, results = await measured(tmp_path, bug)
    assert not good
    for state in (State.WARM, State.HOT):
        assert all("GetAgent returned an agent of" in reason for reason in reasons(results, state))
    assert reasons(results, State.COLD) == {"verified"}


@pytest.mark.parametrize("bug", [Bug.SAYS_HOT, Bug.SAYS_WARM])
async def test_a_report_that_lies_about_its_source(tmp_path: Path, bug: Bug) -> None:
    good, results = await measured(tmp_path, bug)
    assert not good
    assert "verified" not in reasons(results, State.WARM)
    assert all("the server counted" in reason for reason in reasons(results, State.WARM))


async def test_an_error_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    good, results = await measured(tmp_path, Bug.BREAKS)
    assert not good
    for sample in results.samples:
        assert sample.invalid_reason is not None
        assert "INTERNAL: the engine failed (id 17)" in sample.invalid_reason
        assert "after 3 tokens" in sample.invalid_reason
        assert sample.ttft_ms is None
        assert sample.e2e_ms is None


async def test_a_stream_that_ends_without_finished(tmp_path: Path) -> None:
    good, results = await measured(tmp_path, Bug.ENDS_EARLY)
    assert not good
    assert {sample.verified for sample in results.samples} == {False}


async def test_an_answer_that_depends_on_the_tier(tmp_path: Path) -> None:
    good, results = await measured(tmp_path, Bug.FORGETS_A_TOKEN_WHEN_WARM)
    assert not good
    assert all("leaves that of the hot sample after 0 tokens" in reason for reason in reasons(results, State.WARM))


async def test_agents_that_cannot_be_deleted_are_a_problem_of_the_run(tmp_path: Path) -> None:
    good, results = await measured(tmp_path, Bug.DELETE_FAILS)
    assert not good
    assert any("DeleteAgent failed: UNAVAILABLE" in problem for problem in results.problems)


async def test_invalid_samples_are_shown_with_their_reasons(tmp_path: Path) -> None:
    await measured(tmp_path, Bug.BREAKS)
    for report in ("report.md", "report.html"):
        text = (tmp_path / report).read_text()
        assert "0 of 6 samples verified" in text
        assert "the engine failed" in text
