"""What SQLite's refusals are called, and who may read beside it."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from warmkv_server.contract.store import Durability
from warmkv_server.kv.catalog.database import READERS_LOCK, Database, Statement


def refusal(database: Database, *statements: Statement) -> int | None:
    with pytest.raises(OSError, match="refused a transaction") as caught:
        database.apply(statements)
    return caught.value.errno


def test_a_full_disk_is_told_by_its_code_and_not_by_a_word(tmp_path: Path) -> None:
    database = Database(tmp_path / "index.sqlite", Durability.NONE)
    assert refusal(database, ("INSERT INTO full_of_words VALUES (1)", ())) == errno.EIO
    (pages,) = database.query("PRAGMA page_count")[0]
    database.query(f"PRAGMA max_page_count = {pages}")
    large: Statement = ("INSERT INTO fingerprints (digest, fields) VALUES (?, ?)", ("d", "x" * 1_000_000))
    assert refusal(database, large) == errno.ENOSPC
    database.close()


def test_who_copies_a_new_index_keeps_its_log_from_being_folded(tmp_path: Path) -> None:
    database = Database(tmp_path / "index.sqlite", Durability.NONE, checkpoint_bytes=1)
    log = tmp_path / "index.sqlite-wal"
    with (tmp_path / READERS_LOCK).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        for digest in "ab":
            before = log.read_bytes()
            database.apply([("INSERT INTO fingerprints (digest, fields) VALUES (?, '{}')", (digest,))])
            assert log.read_bytes().startswith(before)
    database.apply([("INSERT INTO fingerprints (digest, fields) VALUES ('c', '{}')", ())])
    assert not log.stat().st_size
    database.close()
