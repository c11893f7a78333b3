"""Whatever lies in a data directory, starts and commands say what they don't know and leave it alone."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from tests.kv.driver import Driver
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import run, run_json
from warmkv_server.errors import OperatorError

LAYOUT = LAYOUTS["everything"]
NAME = f"{'0' * 32}.append.{'0' * 32}.safetensors"
FOLDERS = ("", "blocks", "blocks/00", "agents", "quarantine")


def plant(folder: Path, name: str) -> list[Path]:
    """Things that are no files, and files with odd names."""
    (folder / "away").symlink_to("/nowhere")
    (folder / f"{name}.loop").symlink_to(f"{name}.loop")
    (folder / f"folder.{name}").mkdir()
    os.mkfifo(folder / f"pipe.{name}")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # Names of sockets are short.
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    odd = os.fsencode(folder) + b"/odd\xff\x1b[2J\n"
    os.close(os.open(odd, os.O_WRONLY | os.O_CREAT))
    return [folder / "away", folder / f"folder.{name}", folder / f"pipe.{name}", folder / "socket"]


@pytest.mark.parametrize("folder", FOLDERS)
async def test_what_is_unexpected_is_named_and_left_alone(
    data_dir: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    planted = plant(data_dir / folder, NAME if folder.startswith("blocks") else f"{'0' * 32}.json")
    for command in (("store", "ls"), ("store", "verify"), ("store", "gc", "--quarantine")):
        result = run(*command, "--data-dir", data_dir)
        assert result.exit_code == 0, result.output
        assert "\x1b[2J" not in result.output
        run_json(*command, "--data-dir", data_dir)
    driver = await Driver.open(data_dir, LAYOUT)
    assert (await driver.reuse("a", context(1000))).length == 1000
    await driver.close()
    lines = [record.getMessage() for record in caplog.records if "left alone" in record.getMessage()]
    assert len(lines) == 1
    assert all(part in lines[0] for part in ("away", "folder.", "pipe.", "socket"))
    assert all(map(os.path.lexists, planted))


async def test_things_under_names_of_the_store_are_left_alone(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    block = next((data_dir / "blocks").glob("*/*.append.*.safetensors"))
    block.unlink()
    block.symlink_to("/etc/passwd")
    manifest = next((data_dir / "agents").iterdir())
    manifest.unlink()
    manifest.mkdir()
    (data_dir / "index.sqlite.damaged-20200101T000000Z").symlink_to("/nowhere")
    (data_dir / "quarantine" / block.name).symlink_to("/nowhere")
    os.mkfifo(data_dir / "index.sqlite.damaged-20200102T000000Z")
    driver = await Driver.open(data_dir, LAYOUT)
    await driver.put("a", context(1000))
    assert (await driver.reuse("a", context(1000))).length == 1000
    await driver.close()
    assert run("store", "ls", "--data-dir", data_dir).exit_code == 0
    assert run("store", "verify", "--data-dir", data_dir).exit_code in (0, 1)
    assert "damaged-2020" in caplog.text


@pytest.mark.parametrize("name", ["index.sqlite", "commits.log", "lock", "reserve", "key"])
async def test_a_link_in_the_place_of_a_file_is_not_written_through(data_dir: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "victim"
    target.write_bytes(b"precious")
    (data_dir / name).unlink()
    (data_dir / name).symlink_to(target)
    with contextlib.suppress(OperatorError):
        driver = await Driver.open(data_dir, LAYOUT)
        await driver.put("a", context(1100))
        await driver.close()
    assert target.read_bytes() == b"precious"
