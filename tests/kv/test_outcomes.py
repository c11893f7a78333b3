"""Outcomes of requests are bounded in RAM, and found for as long as they are kept."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.kv.disk import RefusingFiles
from tests.kv.driver import TENANT, Driver
from tests.kv.words import context
from warmkv_server.contract.store import Durability
from warmkv_server.errors import MemoryBudget
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog.commit_log import CommitLog
from warmkv_server.kv.catalog.database import Database
from warmkv_server.kv.catalog.journal import Journal
from warmkv_server.kv.catalog.stored_outcomes import KeptOutcome, StoredOutcomes
from warmkv_server.kv.index.records import RequestOutcome
from warmkv_server.kv.tasks.outcomes import Outcomes

ENDLESS = 3600.0
LIMIT = 50_000
COUNT = 60


def outcome(number: int) -> RequestOutcome:
    return RequestOutcome(f"request {number}", bytes([number]), bytes([number]) * 2000)


async def test_those_beyond_the_bound_are_found_in_the_index(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, outcome_bytes=LIMIT)
    for number in range(COUNT):
        await driver.put("a", context(300 + number), request=outcome(number))
        assert driver.store.stats().outcome_bytes <= LIMIT
    for _ in range(2):
        assert 0.5 * LIMIT < driver.store.stats().outcome_bytes <= LIMIT
        for number in range(COUNT):
            assert await driver.store.outcome(TENANT, f"request {number}") == outcome(number)
        assert await driver.store.outcome(TENANT, "another") is None
        assert await driver.store.outcome("another", "request 0") is None
        await driver.close()
        driver = await Driver.open(tmp_path, outcome_bytes=LIMIT)
    await driver.close()


@pytest.mark.parametrize("limit", [LIMIT, 1 << 30])
def test_old_ones_are_forgotten_wherever_they_are(tmp_path: Path, limit: int) -> None:
    database = Database(tmp_path / "index.sqlite", Durability.NONE)
    commits = CommitLog(tmp_path, Files(Durability.NONE))
    outcomes = Outcomes(Journal(database, commits), limit, StoredOutcomes([], None))
    for number in range(COUNT):
        outcomes.add(KeptOutcome(TENANT, outcome(number), time=1000.0 * number))
    assert outcomes.forget(0.0) == []
    assert len(outcomes.forget(1000.0 * COUNT)) == 1
    assert outcomes.nbytes == 0
    assert outcomes.forget(1000.0 * COUNT) == []
    database.close()


async def test_the_index_forgets_old_ones_too(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, outcome_seconds=0.2)
    await driver.put("a", context(300), request=outcome(1))
    for more in range(1, 100_000):  # each commit has it look
        if not driver.store.stats().outcome_bytes:
            break
        await driver.put("a", context(300, [more]))
    assert not driver.store.stats().outcome_bytes
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert await driver.store.outcome(TENANT, "request 1") is None
    await driver.close()


async def test_those_that_the_disk_refuses_are_bounded_with_all_that_it_refuses(tmp_path: Path) -> None:
    files = RefusingFiles()
    driver = await Driver.open(tmp_path, files=files, hot_bytes=1_000_000, retry_seconds=ENDLESS)
    files.refusal = errno.ENOSPC
    taken: list[RequestOutcome] = []

    async def flood() -> None:
        while len(taken) < 1000:
            large = RequestOutcome(str(len(taken)), b"", bytes(100_000))
            await driver.put("a", context(300 + len(taken)), request=large)
            taken.append(large)

    with pytest.raises(MemoryBudget):
        await flood()
    assert 1 < len(taken) < 12
    files.refusal = None
    assert await driver.store.flush()
    for each in taken:
        assert await driver.store.outcome(TENANT, each.request_id) == each
    await driver.close()
