"""The index on disk: one SQLite file, read whole at start, appended to by small transactions. Blocking.

Transactions are numbered, so that an index that has lost the last ones can be told from a whole one.

No other process opens the file while this one has it, and SQLite keeps what it shares between processes in this one's
memory instead: a file mapped into memory kills the process where the system refuses a write to it. Who reads beside a
server takes a copy (`readonly.py`), while nobody folds the log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.files import open_private

SCHEMA_VERSION = 2
INDEX_FILE = "index.sqlite"
PAGE_BYTES = 4096
_FRAME_BYTES = PAGE_BYTES + 24
CHECKPOINT_BYTES = 4 << 20
"""Size of the write-ahead log at which it is folded into the file."""
_RESERVE_BYTES = 1 << 20
READERS_LOCK = "index.readers"
"""Locked (flock, shared) by who copies the index; by its owner, alone, while the log is folded into the file."""
_BUSY_SECONDS = 0.1
"""Only somebody who copies the index beside the server can make it wait, and only when it folds its log."""
_POLL_SECONDS = 0.005

Statement = tuple[str, Sequence[Any]]

_SCHEMA = """
CREATE TABLE fingerprints (
    number INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    fields TEXT NOT NULL           -- JSON object
);
CREATE TABLE nodes (
    row INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    tenant TEXT NOT NULL,
    fingerprint TEXT NOT NULL,     -- digest
    parent BLOB NOT NULL,
    start INTEGER NOT NULL,
    tokens BLOB NOT NULL,          -- little-endian int32, from the start of the block to the node's end
    parts TEXT NOT NULL,           -- JSON: kind -> [bytes, xxh3-128]
    lost TEXT,                     -- why a file it should have is gone
    extra_key BLOB NOT NULL DEFAULT x''
);
CREATE TABLE agents (
    incarnation INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    revision INTEGER NOT NULL,
    kept TEXT NOT NULL,            -- JSON list of boundaries
    previous INTEGER NOT NULL,
    pinned INTEGER NOT NULL,
    ttl REAL,
    labels TEXT NOT NULL,          -- JSON object
    create_time REAL NOT NULL,
    update_time REAL NOT NULL,
    last_used REAL NOT NULL,
    parent_agent_id TEXT NOT NULL,
    ending TEXT NOT NULL,
    UNIQUE (tenant, agent_id)
);
CREATE TABLE chain (
    agent INTEGER NOT NULL,
    start INTEGER NOT NULL,
    node INTEGER NOT NULL,
    PRIMARY KEY (agent, start)
) WITHOUT ROWID;
CREATE TABLE snapshots (
    agent INTEGER NOT NULL,
    length INTEGER NOT NULL,
    node INTEGER NOT NULL,
    PRIMARY KEY (agent, length)
) WITHOUT ROWID;
CREATE TABLE outcomes (
    row INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    request_id TEXT NOT NULL,
    body_hash BLOB NOT NULL,
    payload BLOB NOT NULL,
    time REAL NOT NULL
);
"""

# Of later versions: what an index that lacks them gets when it is opened.
_ADDITIONS = """
CREATE TABLE IF NOT EXISTS commits (   -- written by every transaction
    one INTEGER PRIMARY KEY CHECK (one = 1),
    number INTEGER NOT NULL,           -- of the transaction
    epoch INTEGER NOT NULL             -- the log was folded into the file so many times
);
INSERT OR IGNORE INTO commits VALUES (1, 0, 0);
CREATE TABLE IF NOT EXISTS epochs (    -- written before the log is folded, so on another page than the above
    one INTEGER PRIMARY KEY CHECK (one = 1),
    epoch INTEGER NOT NULL
);
INSERT OR IGNORE INTO epochs VALUES (1, 0);
CREATE TABLE IF NOT EXISTS spared (    -- block files that no agent references, and that no start may remove
    name TEXT PRIMARY KEY
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS vocabularies (
    fingerprint TEXT PRIMARY KEY,
    size INTEGER NOT NULL              -- token ids are below
) WITHOUT ROWID;
"""


class JournalDamaged(Exception):
    """The file is not a readable index any more."""


def of_version_1(path: Path) -> OperatorError:
    return OperatorError(
        f"{path.parent} is a data directory of format 1; start a server on it once, which takes it over, or use the "
        "version of WarmKV that wrote it"
    )


class Database:
    """The connection. Blocking; used by one thread at a time.

    Beside the index lies a file of nothing: space that removing things can have on a disk that is full.
    """

    def __init__(
        self,
        path: Path,
        durability: Durability,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
        *,
        create: bool = True,
        from_1: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            checkpoint_bytes: size of the write-ahead log at which it is folded into the file.
            create: begin an empty index where there is none; without it, that counts as damage.
            from_1: turn an index of format 1 into one of format 2; by what names files went there, what they are called
                now. None to refuse it.

        Raises:
            JournalDamaged
            OperatorError: it was written by a newer version, or can't be opened.
        """
        self.path = path
        self._wal = path.with_name(path.name + "-wal")
        self._reserve = path.with_name("reserve")
        self._readers = path.with_name(READERS_LOCK)
        self._checkpoint_bytes = checkpoint_bytes
        self.bytes_written = 0
        self.disk_bytes = 0
        """What the index takes on disk, its log counted as large as it may get."""
        self.number = 0
        """Of the last transaction."""
        self._epoch = 0
        if not create and not path.exists():
            raise JournalDamaged("it is missing")
        if not _has_room(path.parent, _RESERVE_BYTES):
            self._use_reserve()  # A full disk has no room for SQLite's log, without which nothing can be removed.
        try:
            _make_private(path)
            with contextlib.suppress(OSError):  # It is made when the log is folded, at the latest.
                _make_private(self._readers)  # A reader that doesn't find it takes it that nobody has the index.
            self._db = sqlite3.connect(path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise _unusable(path, error) from error
        try:
            self._prepare(durability, create, from_1)
        except sqlite3.OperationalError as error:
            self._db.close()
            raise _unusable(path, error) from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise JournalDamaged(str(error)) from error
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, durability: Durability, create: bool, from_1: Mapping[str, str] | None) -> None:
        run = self._db.execute
        run("PRAGMA locking_mode = EXCLUSIVE").fetchall()  # Before the log is opened: no file of shared memory then.
        run("PRAGMA mmap_size = 0").fetchall()
        run(f"PRAGMA page_size = {PAGE_BYTES}")
        run("PRAGMA journal_mode = WAL").fetchall()
        run("PRAGMA wal_autocheckpoint = 0").fetchall()
        run("PRAGMA secure_delete = ON").fetchall()  # Deleted contexts are to be gone, not merely unlisted.
        run(f"PRAGMA synchronous = {'OFF' if durability is Durability.NONE else 'FULL'}")
        if durability is Durability.FULL:
            run("PRAGMA fullfsync = ON")
            run("PRAGMA checkpoint_fullfsync = ON")
        version = run("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise OperatorError(
                f"the index {self.path} has format {version}, and this version of WarmKV knows up to {SCHEMA_VERSION}; "
                "start the newer version, or give another --data-dir"
            )
        if version == 1 and from_1 is None:
            raise of_version_1(self.path)
        if version == 0:
            if not create:
                raise JournalDamaged("it is empty")
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        if (found := run("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise JournalDamaged(str(found))
        with contextlib.suppress(sqlite3.OperationalError):  # Only looking up old outcomes is slower without it.
            run("CREATE INDEX IF NOT EXISTS outcomes_by_id ON outcomes (tenant, request_id)")
        if not run("SELECT 1 FROM sqlite_master WHERE name = 'vocabularies'").fetchone():
            self._db.executescript(f"BEGIN IMMEDIATE; {_ADDITIONS} COMMIT;")
        if version == 1 and from_1 is not None:
            self._take_over(from_1)
        self.number, self._epoch = read_number(self)
        self._make_reserve()
        self._measure()

    def _take_over(self, names: Mapping[str, str]) -> None:
        """One transaction: what format 2 has more, and the names that files have there."""
        run = self._db.execute
        run("BEGIN IMMEDIATE")
        run("ALTER TABLE nodes ADD COLUMN extra_key BLOB NOT NULL DEFAULT x''")
        self._db.executemany("UPDATE spared SET name = ? WHERE name = ?", ((new, old) for old, new in names.items()))
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        run("COMMIT")

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._db.execute(sql, parameters).fetchall()

    def remove(self, statements: Sequence[Statement], number: int | None = None) -> None:
        """`apply` for what makes room: if the disk is full, it has the reserve.

        Raises:
            OSError: the disk refused.
        """
        try:
            self.apply(statements, number)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._use_reserve():
                raise
            self.apply(statements, number)

    def apply(self, statements: Sequence[Statement], number: int | None = None) -> None:
        """One transaction: all of them, durably, or none.

        Args:
            number: the transaction's, above all before; None for the next one.

        Raises:
            OSError: the disk refused.
        """
        before = self._wal_size()
        number = self.number + 1 if number is None else number
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for sql, parameters in statements:
                self._db.execute(sql, parameters)
            self._db.execute("UPDATE commits SET number = ?, epoch = ?", (number, self._epoch))
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:  # also one that says that the file is damaged
            self._rollback()
            full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL  # the rest says more
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, f"the index refused a transaction: {error}") from error
        except BaseException:
            self._rollback()
            raise
        self.number = number
        after = self._wal_size()
        self.bytes_written += after - before
        if after >= self._checkpoint_bytes:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the file and empty it."""
        with self._alone() as alone:
            if not alone:
                return  # Somebody reads. The log goes on growing; nothing in it is lost.
            try:
                self._next_epoch()
                frames = self._wal_size() // _FRAME_BYTES
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except sqlite3.DatabaseError:
                self._rollback()
                return  # As above.
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        self.bytes_written += min(frames, pages) * PAGE_BYTES  # Each page once: at most so many.
        self._make_reserve()
        self._measure()

    def close(self) -> None:
        self.checkpoint()
        with self._alone():  # SQLite folds what is left.
            self._db.close()

    def _next_epoch(self) -> None:
        """So that another file's log, or another log's file, is told from this one's."""
        if not self._wal_size():
            return
        epoch = self._epoch + 1
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("UPDATE epochs SET epoch = ?", (epoch,))
        self._db.execute("UPDATE commits SET epoch = ?", (epoch,))
        self._db.execute("COMMIT")
        self._epoch = epoch

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody copies the index during the block; waits for that a little."""
        try:
            fd = open_private(self._readers, os.O_RDONLY)
        except OSError:
            yield True  # Without the file there are no readers either.
            return
        try:
            yield _locked(fd)
        finally:
            os.close(fd)

    def _measure(self) -> None:
        log = max(self._wal_size(), self._checkpoint_bytes)
        self.disk_bytes = _size(self.path) + log + _RESERVE_BYTES

    def _make_reserve(self) -> None:
        if _size(self._reserve) < _RESERVE_BYTES and _has_room(self.path.parent, 2 * _RESERVE_BYTES):
            with contextlib.suppress(OSError):  # No room now; the next checkpoint tries again.
                fd = open_private(self._reserve, os.O_WRONLY | os.O_TRUNC)
                with os.fdopen(fd, "wb") as file:
                    file.write(bytes(_RESERVE_BYTES))

    def _use_reserve(self) -> bool:
        try:
            held = _size(self._reserve)
            self._reserve.unlink()
        except OSError:
            return False
        return held > 0

    def _rollback(self) -> None:
        if self._db.in_transaction:
            with contextlib.suppress(sqlite3.DatabaseError):  # SQLite may have rolled back by itself.
                self._db.execute("ROLLBACK")

    def _wal_size(self) -> int:
        return _size(self._wal)


class Queryable(Protocol):
    """A database, for writing too or for reading only."""

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]: ...


def read_number(db: Queryable) -> tuple[int, int]:
    """The number of the last transaction, and the epoch; zeros in an index of an earlier version.

    Raises:
        JournalDamaged: the file and its log are not of each other.
    """
    if not db.query("SELECT 1 FROM sqlite_master WHERE name = 'vocabularies'"):
        return 0, 0
    rows = db.query("SELECT number, commits.epoch, epochs.epoch FROM commits, epochs")
    if len(rows) != 1 or not all(type(value) is int and value >= 0 for value in rows[0]):
        raise JournalDamaged("it doesn't say which transaction was its last")
    number, epoch, folded = rows[0]
    if epoch != folded:
        raise JournalDamaged(f"its file is of epoch {folded} and its log of epoch {epoch}")
    return number, epoch


def _locked(fd: int) -> bool:
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


def _make_private(path: Path) -> None:
    """An empty file where there is none; SQLite gives its log the same mode."""
    with contextlib.suppress(FileExistsError):
        os.close(open_private(path, os.O_WRONLY | os.O_EXCL))


def _unusable(path: Path, error: Exception) -> OperatorError:
    return OperatorError(
        f"the index {path} can't be used ({error}); see that the disk has room, that the folder and the file can be "
        "written, and that no other program has it open"
    )


def _has_room(folder: Path, nbytes: int) -> bool:
    volume = os.statvfs(folder)
    return volume.f_bavail * volume.f_frsize >= nbytes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def insert(table: str, **values: Any) -> Statement:
    """Put a row. One with the same key is replaced."""
    names = ", ".join(values)
    return f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({', '.join('?' * len(values))})", tuple(values.values())


def as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
