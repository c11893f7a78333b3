"""What a container's control groups leave of the machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from warmkv_server.platform.memory import describe, machine_bytes, usable_bytes

GROUPS: dict[str, tuple[str, dict[str, str], int | None]] = {
    "no groups": ("", {}, None),
    "version 2, in a container": ("0::/\n", {"memory.max": "1000000"}, 1_000_000),
    "version 2, unlimited": ("0::/a/b\n", {"a/b/memory.max": "max"}, None),
    "version 2, a group above": ("0::/a/b\n", {"a/memory.max": "2000000", "a/b/memory.max": "max"}, 2_000_000),
    "version 2, the path is the host's": ("0::/kubepods/x\n", {"memory.max": "3000000"}, 3_000_000),
    "version 1": (
        "5:cpu,cpuacct:/x\n4:memory:/docker/x\n",
        {"memory/docker/x/memory.limit_in_bytes": "4000000", "memory/memory.limit_in_bytes": "9223372036854771712"},
        4_000_000,
    ),
    "version 1, the path is the host's": (
        "4:memory:/docker/x\n0::/\n",
        {"memory/memory.limit_in_bytes": "5000000"},
        5_000_000,
    ),
    "version 1, unlimited": ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    "more than the machine has": ("0::/\n", {"memory.max": str(1 << 60)}, None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_least_limit_counts(tmp_path: Path, name: str) -> None:
    told, files, expected = GROUPS[name]
    files = {"proc/self/cgroup": told, **{f"sys/fs/cgroup/{file}": text for file, text in files.items()}}
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert usable_bytes(tmp_path) == (machine_bytes() if expected is None else expected)
    assert ("a container's limit" in describe(tmp_path)) is (expected is not None)


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert usable_bytes(tmp_path) == machine_bytes()
