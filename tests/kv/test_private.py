"""Nobody but the server's user reads what a data directory holds."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from tests.kv.driver import TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import run

NOBODY = 65534


def open_to_others(folder: Path) -> list[Path]:
    found = []
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode != (0o700 if path.is_dir() else 0o600):
            found.append(path)
    return found


async def live(data_dir: Path) -> None:
    """Commits, a fork, a deletion, a damaged block, a damaged index, an export and an import."""
    driver = await Driver.open(data_dir, LAYOUTS["everything"])
    await driver.put("a", context(700), keep=[700])
    await driver.store.fork(TENANT, "a", "b")
    await driver.put("c", context([7] * 300))
    await driver.store.delete(TENANT, "c")
    await driver.close()
    block = next((data_dir / "blocks").glob("*/*.append.*.safetensors"))
    block.write_bytes(block.read_bytes()[:-1])
    (data_dir / "index.sqlite").write_bytes(b"nonsense" * 1000)
    driver = await Driver.open(data_dir, LAYOUTS["everything"])
    await driver.put("a", context(900))
    await driver.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
async def test_everything_is_private_after_a_full_life(tmp_path: Path, umask: int) -> None:
    data_dir = tmp_path / "data"
    before = os.umask(umask)
    try:
        await live(data_dir)
        archive = tmp_path / "archive"
        archive.mkdir()
        archive.chmod(0o700)
        for arguments in (
            ("agents", "export", "a", "-o", archive / "a.warmkv", "--tenant", TENANT),
            ("agents", "import", archive / "a.warmkv", "--as", "d"),
            ("store", "verify", "--quarantine"),
            ("store", "rebuild-index"),
        ):
            result = await asyncio.to_thread(run, *arguments, "--data-dir", data_dir)
            assert result.exit_code in (0, 1), result.output
    finally:
        os.umask(before)
    assert any((data_dir / "quarantine").iterdir())
    assert list(data_dir.glob("index.sqlite.*-*"))
    assert open_to_others(data_dir) == []
    assert open_to_others(archive) == []


async def test_an_existing_directory_becomes_private_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_dir = tmp_path / "data"
    await live(data_dir)
    for path in (data_dir, *data_dir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    caplog.clear()
    driver = await Driver.open(data_dir, LAYOUTS["everything"])
    await driver.close()
    assert open_to_others(data_dir) == []
    (said,) = [record.getMessage() for record in caplog.records if "others could use" in record.getMessage()]
    assert str(data_dir) in said
    caplog.clear()
    driver = await Driver.open(data_dir, LAYOUTS["everything"])
    await driver.close()
    assert "others could use" not in caplog.text


def test_a_folder_that_somebody_else_uses_too_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "somebody's.txt").write_text("hello")
    (tmp_path / "somebody's.txt").chmod(0o644)
    tmp_path.chmod(0o755)
    asyncio.run(live(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert {path.name for path in open_to_others(tmp_path)} == {tmp_path.name, "somebody's.txt"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_reads_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder not in (Path("/"), Path("/tmp")):
            folder.chmod(0o755)
    data_dir = tmp_path / "data"
    asyncio.run(live(data_dir))
    data_dir.chmod(0o755)  # Even then.
    paths = [str(path) for path in data_dir.rglob("*")]
    pid = os.fork()
    if not pid:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        readable = 0
        for path in paths:
            try:
                os.close(os.open(path, os.O_RDONLY))
                readable += 1
            except OSError:
                pass
        os._exit(min(readable, 100))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
