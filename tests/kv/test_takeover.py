"""A data directory of format 1, as its last server left it: taken over without a tensor written again."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.kv.books import check_directory, check_sums
from tests.kv.driver import FINGERPRINT, TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.version_1.directories import unpack
from warmkv_server.contract.kv import Fallback, Source
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.names import Name
from warmkv_server.kv.index.records import Fingerprint, RequestOutcome
from warmkv_server.offline.directory import look
from warmkv_server.offline.verify import verify

LAYOUT = LAYOUTS["everything"]
TOKENS = context(300)
NOW = Fingerprint({**FINGERPRINT.fields, "implementation": "the file of today"})
LATER = Fingerprint({**FINGERPRINT.fields, "implementation": "another file"})


def blocks(data_dir: Path) -> dict[str, tuple[int, bytes]]:
    """By name, where each file is and what is in it."""
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in data_dir.glob("blocks/*/*")}


async def test_its_agents_are_warm_and_its_files_are_the_same(tmp_path: Path) -> None:
    data_dir = unpack("store", tmp_path / "data")
    before = blocks(data_dir)
    for name in ("models.json.0.tmp", "commits.log.0.tmp"):  # of a start that was killed
        (data_dir / name).write_bytes(b"half")
    driver = await Driver.open(data_dir, LAYOUT, NOW)
    for agent in ("a", "fork"):
        reuse = await driver.reuse(agent, TOKENS)
        assert (reuse.source, reuse.length, reuse.fallback) == (Source.WARM, 300, None)
        await driver.store.evict(TENANT, agent)
    assert (await driver.reuse("a", TOKENS[:280])).length == 256  # a boundary that was kept
    fork = driver.store.agent(TENANT, "fork")
    assert fork is not None
    assert (fork.pinned, fork.labels, fork.parent_agent_id) == (True, {"k": "v"}, "a")
    assert await driver.store.outcome(TENANT, "request") == RequestOutcome("request", b"hash", b"answer")
    check_sums(driver.store)
    check_directory(driver.store, data_dir)
    assert list(data_dir.glob("*.tmp")) == []
    after = blocks(data_dir)
    assert sorted(after.values()) == sorted(before.values())
    assert all(Name.parse(name) is not None for name in after)
    await driver.put("a", context(300, [7] * 300))  # it goes on with what was taken over
    await driver.close()
    assert verify(lambda: look(data_dir)).problems == []
    driver = await Driver.open(data_dir, LAYOUT, NOW)
    assert (await driver.reuse("a", context(300, [7] * 300))).warm_tokens == 600
    await driver.close()


async def test_another_implementation_of_the_model_misses_once_one_was_served(tmp_path: Path) -> None:
    data_dir = unpack("store", tmp_path / "data")
    driver = await Driver.open(data_dir, LAYOUT, NOW)
    await driver.close()
    driver = await Driver.open(data_dir, LAYOUT, LATER)
    reuse = await driver.reuse("a", TOKENS)
    assert (reuse.length, reuse.fallback) == (0, Fallback.FINGERPRINT)
    record = driver.store.agent(TENANT, "a")
    assert record is not None
    assert [each.partition(":")[0] for each in record.fingerprint_differences] == ["implementation"]
    await driver.close()
    driver = await Driver.open(data_dir, LAYOUT, NOW)
    assert (await driver.reuse("a", TOKENS)).length == 300
    await driver.close()


@pytest.mark.parametrize("first", [False, True])
async def test_a_lost_index_costs_no_kv(tmp_path: Path, first: bool) -> None:
    """Whether it is lost before the takeover or afterwards."""
    data_dir = unpack("store", tmp_path / "data")
    if not first:
        await (await Driver.open(data_dir, LAYOUT, NOW)).close()
    (data_dir / "index.sqlite").unlink()
    driver = await Driver.open(data_dir, LAYOUT, NOW)
    reuse = await driver.reuse("a", TOKENS)
    assert (reuse.source, reuse.length) == (Source.WARM, 300)
    await driver.close()
    driver = await Driver.open(data_dir, LAYOUT, LATER)
    assert (await driver.reuse("a", TOKENS)).length == 0
    await driver.close()


async def test_what_a_rebuild_spared_stays_spared(tmp_path: Path) -> None:
    data_dir = unpack("store", tmp_path / "data")
    stray = next(data_dir.glob("blocks/*/*.append.safetensors"))
    spared = stray.with_name(f"{stray.name[:2]}{'0' * 30}.append.safetensors")
    shutil.copy(stray, spared)
    with closing(sqlite3.connect(data_dir / "index.sqlite")) as index:
        index.execute("INSERT INTO spared VALUES (?)", (spared.name,))
        index.commit()
    driver = await Driver.open(data_dir, LAYOUT)
    await driver.close()
    (kept,) = data_dir.glob(f"blocks/*/{stray.name[:2]}{'0' * 30}.*")
    assert Name.parse(kept.name) is not None


async def test_a_file_without_a_header_goes_to_quarantine_and_costs_a_prefill(tmp_path: Path) -> None:
    data_dir = unpack("store", tmp_path / "data")
    largest = max(data_dir.glob("blocks/*/*.append.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"nothing")
    driver = await Driver.open(data_dir, LAYOUT)
    assert (await driver.reuse("a", TOKENS)).fallback is Fallback.MISSING_BLOCK
    assert [path.name for path in (data_dir / "quarantine").iterdir()] == [largest.name]
    await driver.put("a", TOKENS)
    await driver.close()


def test_commands_say_what_to_do_with_it(tmp_path: Path) -> None:
    data_dir = unpack("store", tmp_path / "data")
    with pytest.raises(OperatorError, match="of format 1; start a server on it once"):
        look(data_dir)


def test_killed_at_any_step_it_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.version_1.kill", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"killed at (\d+) steps\n", done.stdout)
    assert found is not None
    assert int(found[1]) > 10
