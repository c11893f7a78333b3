"""Disks that refuse."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from tests.kv.driver import Driver
from warmkv_server.contract.store import Durability
from warmkv_server.kv.blocks.files import Files


class RefusingFiles(Files):
    """Real files, until `refusal` is an errno: then new content is cut off, and names can't be changed.

    Attributes:
        unlinking: whether block files can be removed.
    """

    def __init__(self, durability: Durability = Durability.NONE) -> None:
        super().__init__(durability)
        self.refusal: int | None = None
        self.unlinking = True

    def fill(self, fd: int, buffers: Sequence[memoryview]) -> None:
        if self.refusal is not None:
            super().fill(fd, [buffers[0][: len(buffers[0]) // 2]])
            self._refuse(None)
        super().fill(fd, buffers)

    def rename(self, source: Path, target: Path) -> None:
        self._refuse(source)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._refuse(path)
        if not self.unlinking and "blocks" in path.parts:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().unlink(path)

    def _refuse(self, path: Path | None) -> None:
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal), path)


def make_index_refuse(driver: Driver, refuse: bool) -> None:
    """Have SQLite itself say no to every write, as it does on a read-only disk."""
    driver.store.core.journal.database.query(f"PRAGMA query_only = {int(refuse)}")
