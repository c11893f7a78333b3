"""How much memory this process may have: the machine's, or what a container's control groups leave of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_V2, _V1 = "memory.max", "memory.limit_in_bytes"


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the least that a control group of this process may have, where that is less.

    Args:
        root: where `proc` and `sys` are.
    """
    return min([machine_bytes(), *_limits(root)])


def describe(root: Path = Path("/")) -> str:
    """What there is, for people."""
    usable, machine = usable_bytes(root), machine_bytes()
    if usable == machine:
        return f"{machine / 2**30:.1f} GiB, all of this machine's"
    return f"{usable / 2**30:.1f} GiB, a container's limit; this machine has {machine / 2**30:.1f} GiB"


def _limits(root: Path) -> Iterator[int]:
    """What cgroups, of version 1 and 2, say. A group is bound by all above it.

    Inside a container the path that `/proc` has may be the host's, and only the top of the tree that is mounted is
    there; that is then the container's own group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _up_from(root / "sys/fs/cgroup", path, _V2)
        elif "memory" in controllers.split(","):
            yield from _up_from(root / "sys/fs/cgroup/memory", path, _V1)


def _up_from(mount: Path, path: str, name: str) -> Iterator[int]:
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
            yield int((folder / name).read_text())
        if folder == mount:
            return
