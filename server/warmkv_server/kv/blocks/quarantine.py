"""Where files go that failed their checks: kept for inspection, oldest out when there are too many bytes of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from warmkv_server.kv.blocks.files import Files, entries, is_plain


def quarantine(files: Files, path: Path, folder: Path, limit: int) -> int:
    """Move a file there. Blocking, from any thread. Returns the bytes that the folder holds afterwards."""
    target = folder / path.name
    number = 0
    while os.path.lexists(target):
        number += 1
        target = folder / f"{path.name}.{number}"
    with contextlib.suppress(FileNotFoundError):  # Somebody else may have moved it.
        files.rename(path, target)
    kept = sorted(_files(folder), key=lambda found: found[1].st_mtime)
    total = sum(stat.st_size for _, stat in kept)
    for entry, stat in kept:
        if total <= limit:
            break
        files.unlink(entry)
        total -= stat.st_size
    return total


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Those that are there; other threads take away too what is too much."""
    for entry in entries(folder):
        if is_plain(entry):
            with contextlib.suppress(FileNotFoundError):
                yield Path(entry.path), entry.stat(follow_symlinks=False)
