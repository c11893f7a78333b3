"""What format 1 has left: archives are imported, directories are a server's to take over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kv.driver import FINGERPRINT, TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import refusal, run, verify
from tests.version_1.directories import AGENT, unpack
from warmkv_server.contract.kv import Source
from warmkv_server.kv.index.records import Fingerprint

LAYOUT = LAYOUTS["everything"]
SMALL = context([9] * 40)
NOW = Fingerprint({**FINGERPRINT.fields, "implementation": "the file of today"})


@pytest.mark.parametrize("taken_over", [False, True])
async def test_an_archive_becomes_an_agent_of_a_directory_of_format_2(tmp_path: Path, taken_over: bool) -> None:
    """Under the ids that a new directory has, or under those that one of format 1 has brought along."""
    data_dir = tmp_path / "data"
    if taken_over:
        unpack("store", data_dir)
    driver = await Driver.open(data_dir, LAYOUT, NOW)
    await driver.store.delete(TENANT, "small")
    await driver.close()
    done = run("agents", "import", AGENT, "--data-dir", data_dir, "--trust")
    assert done.exit_code == 0, done.output
    assert verify(data_dir).problems == []
    driver = await Driver.open(data_dir, LAYOUT, NOW)
    reuse = await driver.reuse("small", SMALL)
    assert (reuse.source, reuse.length, reuse.fallback) == (Source.WARM, 40, None)
    await driver.close()


async def test_an_archive_of_another_model_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    other = Fingerprint({**NOW.fields, "weights": "w2"})
    await (await Driver.open(tmp_path, LAYOUT, other)).close()
    assert "it differs in implementation" in refusal("agents", "import", AGENT, "--data-dir", tmp_path)


async def test_what_was_taken_over_is_exported_and_imported_elsewhere(tmp_path: Path) -> None:
    """Its ids hang from the digest of format 1, and those of a new directory from its own."""
    old, new = unpack("store", tmp_path / "old"), tmp_path / "new"
    await (await Driver.open(old, LAYOUT, NOW)).close()
    await (await Driver.open(new, LAYOUT, NOW)).close()
    archive = tmp_path / "a.tar"
    done = run("agents", "export", "a", "--tenant", TENANT, "--data-dir", old, "-o", archive)
    assert done.exit_code == 0, done.output
    done = run("agents", "import", archive, "--data-dir", new, "--trust")
    assert done.exit_code == 0, done.output
    assert verify(new).problems == []
    driver = await Driver.open(new, LAYOUT, NOW)
    assert (await driver.reuse("a", context(300))).warm_tokens == 300
    await driver.put("other", context(300, [1]))
    await driver.close()


COMMANDS = {
    "ls": ("store", "ls"),
    "verify": ("store", "verify"),
    "gc": ("store", "gc"),
    "rebuild": ("store", "rebuild-index"),
    "export": ("agents", "export", "a", "--tenant", TENANT, "-o", "unused.tar"),
    "import": ("agents", "import", str(AGENT), "--trust"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_leave_a_directory_of_format_1_alone_and_say_what_to_do(tmp_path: Path, name: str) -> None:
    data_dir = unpack("store", tmp_path / "data")
    before = {path: path.read_bytes() for path in data_dir.glob("blocks/*/*")}
    assert "of format 1; start a server on it once" in refusal(*COMMANDS[name], "--data-dir", data_dir)
    assert {path: path.read_bytes() for path in data_dir.glob("blocks/*/*")} == before


def test_commands_say_so_too_where_its_index_is_lost(tmp_path: Path) -> None:
    data_dir = unpack("store", tmp_path / "data")
    (data_dir / "index.sqlite").unlink()
    shutil.rmtree(data_dir / "agents")
    assert "of format 1; start a server on it once" in refusal("store", "rebuild-index", "--data-dir", data_dir)
