"""Where files go that failed their checks: kept for inspection, oldest out when there are too many bytes of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from warmkv_server.kv.files import Files


def quarantine(files: Files, path: Path, folder: Path, limit: int) -> int:
    """Move a file there. Blocking. Returns the bytes that the folder holds afterwards."""
    target = folder / path.name
    number = 0
    while target.exists():
        number += 1
        target = folder / f"{path.name}.{number}"
    with contextlib.suppress(FileNotFoundError):  # Somebody else may have moved it.
        files.rename(path, target)
    kept = sorted(((e.stat(), e) for e in folder.iterdir() if e.is_file()), key=lambda pair: pair[0].st_mtime)
    total = sum(stat.st_size for stat, _ in kept)
    for stat, entry in kept:
        if total <= limit:
            break
        files.unlink(entry)
        total -= stat.st_size
    return total
