"""Memory that is kept for the next request goes back to the system when none comes."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys

import pytest

from tests.engine.conftest import FolderOf
from tests.engine.runs import job_of, outcome, prompt_of, running
from warmkv_server.engine.steps import loop

KEEP_AND_GIVE_BACK = """
from pathlib import Path
from warmkv_server.platform.malloc import give_back, keep_freed_memory

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

assert keep_freed_memory()
before = resident()
blocks = [bytearray(b"1" * (4 << 20)) for _ in range(64)]
held = resident() - before
del blocks
kept = resident() - before
give_back()
print(held, kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept_and_given_back() -> None:
    run = subprocess.run([sys.executable, "-c", KEEP_AND_GIVE_BACK], capture_output=True, text=True, check=True)
    held, kept, rest = map(int, run.stdout.split())
    assert held > 200
    assert kept > 200
    assert rest < 20


async def test_an_engine_without_work_gives_memory_back(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    event_loop, given = asyncio.get_running_loop(), asyncio.Event()
    monkeypatch.setattr(loop, "REST_SECONDS", 0.01)
    monkeypatch.setattr(loop, "give_back", lambda: event_loop.call_soon_threadsafe(given.set))
    async with running(folder_of("llama")) as engine:
        await given.wait()
        got = await outcome(engine.submit(job_of(prompt_of(8), 4)))
        assert len(got.finished.completion) == 4
        given.clear()
        await given.wait()
