"""A server that is killed loses nothing that it acknowledged."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TRIALS = 100
RAM_DISK = Path("/dev/shm")
"""What is in the page cache survives a kill, so a RAM disk tests the same, and ten times as many operations."""


def test_every_acknowledged_state_survives_kill_9() -> None:
    folder = tempfile.mkdtemp(prefix="warmkv-kill-", dir=RAM_DISK if RAM_DISK.is_dir() else None)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "tests.kv.kill_loop", folder, str(TRIALS), "1"],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=Path(__file__).parents[2],
        )
        assert run.returncode == 0, run.stdout + run.stderr
        print(run.stdout)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
