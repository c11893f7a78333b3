"""Digests of files and settings, for the fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash


def digest_files(paths: Sequence[Path], progress: Callable[[int, int], object] = lambda _done, _total: None) -> str:
    """Of names and bytes.

    Args:
        progress: is told of how many bytes it is so far, and in all.
    """
    digest, done, total = xxhash.xxh3_128(), 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
