"""Commands of `warmkv` that tests run to their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e import preloaded
from tests.e2e.harness import WARMKV, clean_environment

RUN_SECONDS = 120.0


def run_warmkv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [str(each) for each in arguments]
    if sys.platform == "linux":
        return preloaded.run(command, clean_environment(), RUN_SECONDS)
    return run_anew(*command)


def run_anew(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in a process that begins from nothing, as an operator's does; with more variables."""
    return subprocess.run(
        [WARMKV, *arguments],
        env={**clean_environment(), **environment},
        text=True,
        capture_output=True,
        timeout=RUN_SECONDS,
        check=False,
    )


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """What an operator did wrong, on one line, and nothing else."""
    lines = [line for line in result.stderr.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert result.returncode == 2, result
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("warmkv: ")
    for word in words:
        assert word in lines[0]
    assert result.stdout == ""
