"""The index as it was last committed, read beside a running server or without one. Changes nothing.

A server keeps its index to itself: what it would share with SQLite's other readers is a file mapped into its memory.
So a reader takes a copy, the log first and then the file. The log only grows, and while the readers' lock is held
nobody folds it into the file; so the copy is one state of the index, that of the moment when the log was copied.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.files import open_file
from warmkv_server.kv.catalog.database import READERS_LOCK, SCHEMA_VERSION, JournalDamaged, of_version_1


class ReadOnlyDatabase:
    """One state of the index. Blocking; a server doesn't notice it but for the time of the copying."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            JournalDamaged
            OperatorError: it can't be read, or another version wrote it.
        """
        self._closing = contextlib.ExitStack()
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self._closing.close()
            raise JournalDamaged(str(error)) from error
        except OSError as error:
            self._closing.close()
            raise OperatorError(
                f"the index {path} can't be read ({error.strerror or error}); see that this user may read the folder "
                f"and the file, and that {tempfile.gettempdir()} has room for a copy"
            ) from error
        except BaseException:
            self._closing.close()
            raise

    def _open(self, path: Path) -> None:
        folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="warmkv-index-")))
        copy = folder / path.name
        with _nobody_folds(path.with_name(READERS_LOCK)):
            with contextlib.suppress(FileNotFoundError):
                _copy(path.with_name(f"{path.name}-wal"), folder / f"{path.name}-wal")
            _copy(path, copy)
        self._db = sqlite3.connect(copy, isolation_level=None)
        self._closing.callback(self._db.close)
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            raise JournalDamaged("it is empty")
        if version == 1:
            raise of_version_1(path)
        if version != SCHEMA_VERSION:
            raise OperatorError(
                f"the index {path} has format {version}, and this version of WarmKV reads {SCHEMA_VERSION}; "
                "use the version that wrote it"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            raise JournalDamaged(str(error)) from error


@contextlib.contextmanager
def _nobody_folds(lock: Path) -> Iterator[None]:
    """Keep the server's log and file as they are, but for what is appended to the log."""
    try:
        fd = open_file(lock)
    except FileNotFoundError:  # No server has had it yet.
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def _copy(source: Path, target: Path) -> None:
    fd = open_file(source)
    with os.fdopen(fd, "rb") as original, target.open("xb") as copy:
        shutil.copyfileobj(original, copy, 1 << 20)
