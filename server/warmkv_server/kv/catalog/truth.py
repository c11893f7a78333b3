"""The index of a data directory, if it can be believed, and a new one if not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.blocks.tier import BlockTier
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.database import INDEX_FILE, Database, JournalDamaged
from warmkv_server.kv.catalog.evidence import Evidence, gather
from warmkv_server.kv.catalog.rebuild import holds_contexts, keep_log, rebuild_index
from warmkv_server.kv.index.index import Index

log = logging.getLogger(__name__)


class NotTheLast(JournalDamaged):
    """The index is readable, and older than what else is there."""

    def __init__(self, why: str, index: Index) -> None:
        super().__init__(why)
        self.index = index


@dataclass
class Believed:
    """An index, and the rest that the directory says, which doesn't contradict it."""

    database: Database
    index: Index
    evidence: Evidence


def believe(database: Database, evidence: Evidence) -> Believed:
    """
    Raises:
        JournalDamaged: also `NotTheLast`.
    """
    index = rows.read_index(database)
    if (why := evidence.against(index, database.number)) is not None:
        raise NotTheLast(why, index)
    return Believed(database, index, evidence)


def open_index(
    data_dir: Path,
    files: Files,
    tier: BlockTier,
    checkpoint_bytes: int,
    quarantine_bytes: int,
    from_1: Mapping[str, str],
) -> Believed:
    """The index, rebuilt if it is lost or is not the last one. The directory's lock is held. Blocking.

    Args:
        from_1: see `Database`.

    Raises:
        OperatorError
    """
    path = data_dir / INDEX_FILE
    evidence = gather(data_dir)
    old: Index | None = None
    log_copy = keep_log(path)
    try:
        try:
            create = not holds_contexts(data_dir, tier)
            return _open(path, files, checkpoint_bytes, evidence, create=create, from_1=from_1)
        except NotTheLast as error:
            old = error.index
            log.error("the index %s is not the last one (%s); building it anew from the files", path, error)
        except JournalDamaged as error:
            log.error("the index %s is lost (%s); building it anew from the files", path, error)
        rebuilt = rebuild_index(data_dir, files, tier, quarantine_bytes, "damaged", evidence, old)
    finally:
        if log_copy is not None:
            log_copy.unlink(missing_ok=True)
    kept = f" (the damaged index is kept as {rebuilt.aside.name})" if rebuilt.aside is not None else ""
    log.warning("the index %s was rebuilt%s: %s", path, kept, rebuilt.summary())
    return _open(path, files, checkpoint_bytes, gather(data_dir), create=False, from_1=from_1)


def _open(
    path: Path,
    files: Files,
    checkpoint_bytes: int,
    evidence: Evidence,
    *,
    create: bool,
    from_1: Mapping[str, str],
) -> Believed:
    database = Database(path, files.durability, checkpoint_bytes, create=create, from_1=from_1)
    try:
        return believe(database, evidence)
    except BaseException:
        database.close()
        raise
