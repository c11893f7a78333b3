"""The command line, as an operator uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from warmkv_server.cli.main import app
from warmkv_server.offline.directory import look
from warmkv_server.offline.findings import Report
from warmkv_server.offline.verify import verify as check


def run(*arguments: str | Path) -> Result:
    """Exit status and what was said; anything but an exit is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def run_json(*arguments: str | Path) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments: str | Path) -> str:
    """What the operator did wrong: one line on stderr, exit status 2, and nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("warmkv: ")
    return line


def verify(data_dir: Path) -> Report:
    """What `store verify` finds, before it is put into words."""
    return check(lambda: look(data_dir))


def tree(data_dir: Path) -> dict[str, bytes]:
    """Every file that a command may not change unasked, with its content; SQLite's own shared memory apart."""
    return {
        str(path.relative_to(data_dir)): path.read_bytes()
        for path in data_dir.rglob("*")
        if path.is_file() and path.suffix not in (".sqlite-shm", ".sqlite-wal") and path.name != "lock"
    }
