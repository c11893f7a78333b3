"""The index as it was last committed, read beside a running server or without one. Changes nothing."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from warmkv_server.errors import OperatorError
from warmkv_server.kv.journal import SCHEMA_VERSION, JournalDamaged


class ReadOnlyDatabase:
    """One state of the index for as long as it is open. Blocking.

    SQLite's log lets one process read while another writes. A server can't fold its log into the file meanwhile, so
    read and close.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            JournalDamaged
            OperatorError: it can't be opened, or another version wrote it.
        """
        self._path = path
        try:
            self._db = self._connect("mode=ro")
        except sqlite3.DatabaseError as error:
            raise JournalDamaged(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            raise JournalDamaged(str(error)) from error

    def _connect(self, mode: str) -> sqlite3.Connection:
        db = sqlite3.connect(f"file:{quote(str(self._path.absolute()))}?{mode}", uri=True, isolation_level=None)
        try:
            db.execute("BEGIN")
            (version,) = db.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError as error:
            db.close()
            if mode == "mode=ro" and not self._log_bytes():
                # A folder that can't be written, where SQLite can't keep its books. Nobody else writes there either.
                return self._connect("immutable=1")
            raise OperatorError(
                f"the index {self._path} can't be read ({error}); see that this user may read the folder and the file"
            ) from error
        except BaseException:
            db.close()
            raise
        if version != SCHEMA_VERSION:
            db.close()
            raise OperatorError(
                f"the index {self._path} has format {version}, and this version of WarmKV reads {SCHEMA_VERSION}; "
                "use the version that wrote it"
            )
        return db

    def _log_bytes(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._path.with_name(f"{self._path.name}-wal").stat().st_size
        return 0
