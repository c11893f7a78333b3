"""`warmkv store rebuild-index`: what a server does by itself when the index is lost, at an operator's word."""

from __future__ import annotations

import contextlib
from pathlib import Path

from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.database import INDEX_FILE, JournalDamaged, of_version_1
from warmkv_server.kv.catalog.evidence import gather
from warmkv_server.kv.catalog.readonly import ReadOnlyDatabase
from warmkv_server.kv.catalog.rebuild import Rebuilt, holds_contexts, rebuild_index
from warmkv_server.kv.catalog.takeover import old_files
from warmkv_server.kv.index.index import Index
from warmkv_server.kv.index.records import Tuning
from warmkv_server.offline.directory import locked, tier_of


def rebuild(data_dir: Path) -> Rebuilt:
    """Build the index anew from manifests and block files, whatever state it is in; the old one is kept beside it.

    Raises:
        OperatorError: not a data directory, a server has it, or there is nothing to rebuild from.
    """
    files = Files(Durability.FULL)
    tier = tier_of(data_dir, files)
    if any(old_files(data_dir)):
        raise of_version_1(data_dir / INDEX_FILE)
    if not (data_dir / INDEX_FILE).exists() and not holds_contexts(data_dir, tier):
        raise OperatorError(
            f"{data_dir} is not a data directory of WarmKV; give the one that was served with --data-dir"
        )
    with locked(data_dir):
        evidence = gather(data_dir)
        return rebuild_index(data_dir, files, tier, Tuning.quarantine_bytes, "replaced", evidence, _old(data_dir))


def _old(data_dir: Path) -> Index | None:
    """What the index that is there says, if it says anything."""
    with (
        contextlib.suppress(JournalDamaged, OperatorError),
        ReadOnlyDatabase(data_dir / INDEX_FILE) as database,
    ):
        return rows.read_index(database)
    return None
