"""Opening a data directory: take it, read the index, put right what a crash left behind, and say what was done."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from warmkv_server.errors import OperatorError
from warmkv_server.kv import journal, rows
from warmkv_server.kv.blockfile import SUFFIX
from warmkv_server.kv.boundaries import in_window
from warmkv_server.kv.core import BLOCKS, QUARANTINE, KeptOutcome, block_path
from warmkv_server.kv.files import TEMP_SUFFIX, Files
from warmkv_server.kv.index import AgentKey, Index
from warmkv_server.kv.journal import CHECKPOINT_BYTES, Database, JournalDamaged
from warmkv_server.kv.lock import DirectoryLock
from warmkv_server.kv.records import Fingerprint, StoreSettings
from warmkv_server.kv.types import Fallback, KVLayout

log = logging.getLogger(__name__)


@dataclass
class Opened:
    """A data directory, ready for use."""

    lock: DirectoryLock
    database: Database
    index: Index
    outcomes: dict[AgentKey, KeptOutcome]
    block_bytes: int
    quarantine_bytes: int


@dataclass
class _Sweep:
    """What was found and put right."""

    temps: int = 0
    orphans: int = 0
    missing: int = 0
    unreferenced: int = 0


def open_directory(settings: StoreSettings, layout: KVLayout, fingerprint: Fingerprint, files: Files) -> Opened:
    """Blocking.

    Raises:
        OperatorError
    """
    make_folders(settings.data_dir, files)
    lock = DirectoryLock(settings.data_dir)
    try:
        database = _open_database(settings)
        try:
            index = rows.read_index(database)
            _count_windows(index, layout, fingerprint.digest)
            sweep = _sweep(settings.data_dir, index, database, files)
            database.apply([rows.insert_fingerprint(fingerprint)])
            files.sync_folders([settings.data_dir])
            outcomes = {
                (tenant, outcome.request_id): KeptOutcome(outcome, time, saved=True)
                for tenant, outcome, time in rows.read_outcomes(database)
            }
        except BaseException:
            database.close()
            raise
    except BaseException:
        lock.release()
        raise
    log.info(
        "opened %s: %d agents, %d nodes; removed %d temporary and %d unknown files and %d unreferenced nodes;"
        " %d files are missing",
        settings.data_dir,
        len(index.agents),
        len(index.nodes),
        sweep.temps,
        sweep.orphans,
        sweep.unreferenced,
        sweep.missing,
    )
    kept = sum(entry.stat().st_size for entry in (settings.data_dir / QUARANTINE).iterdir())
    return Opened(lock, database, index, outcomes, sum(n.disk_bytes for n in index.nodes.values()), kept)


def make_folders(data_dir: Path, files: Files) -> None:
    """All folders there will ever be, so that no commit has to make one.

    Raises:
        OperatorError
    """
    blocks = data_dir / BLOCKS
    try:
        (data_dir / QUARANTINE).mkdir(parents=True, exist_ok=True)
        blocks.mkdir(exist_ok=True)
        missing = {f"{number:02x}" for number in range(256)} - {e.name for e in blocks.iterdir()}
        for name in missing:
            (blocks / name).mkdir()
        if missing:
            files.sync_folders([blocks, data_dir, data_dir.parent])
    except OSError as error:
        raise OperatorError(
            f"the data directory {data_dir} can't be prepared ({error.strerror}); "
            "give another with --data-dir, or change its permissions"
        ) from error


def block_files(data_dir: Path) -> Iterator[os.DirEntry[str]]:
    """Everything that lies in the block folders."""
    for folder in sorted((data_dir / BLOCKS).iterdir()):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from entries


def _open_database(settings: StoreSettings) -> Database:
    path = settings.data_dir / journal.FILE_NAME
    lost = not path.exists() and any(e.name.endswith(SUFFIX) for e in block_files(settings.data_dir))
    try:
        if not lost:
            small = settings.disk_bytes // 64 if settings.disk_bytes else CHECKPOINT_BYTES
            return Database(path, settings.durability, min(CHECKPOINT_BYTES, small))
        log.warning("the index %s is missing, though there are block files", path)
    except JournalDamaged as error:
        aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        log.error("the index %s is damaged (%s); it is kept as %s", path, error, aside.name)
        path.rename(aside)
        for extra in ("-wal", "-shm"):
            path.with_name(path.name + extra).unlink(missing_ok=True)
    raise OperatorError(
        f"the index {path} is lost, and the block files alone don't say whose they are; put it back from a backup, "
        "or move the data directory away to begin with an empty one"
    )


def _count_windows(index: Index, layout: KVLayout, fingerprint: str) -> None:
    """Which WINDOW parts each agent needs follows from its boundaries. Those of other models are left alone."""
    for agent in index.agents.values():
        if agent.fingerprint == fingerprint:
            boundaries = {len(agent.tokens), agent.previous, *agent.kept} - {0}
            agent.windowed = {n for b in boundaries for n in in_window(agent.nodes, b, layout.window)}
        else:
            agent.windowed = set(agent.nodes)
        for node in agent.windowed:
            node.window_refs += 1


def _sweep(data_dir: Path, index: Index, database: Database, files: Files) -> _Sweep:
    sweep = _Sweep()
    gone = [node for node in index.nodes.values() if not node.refs]
    for node in gone:
        del index.nodes[node.id]
    sweep.unreferenced = len(gone)
    known = {
        block_path(data_dir, node.id.hex(), kind): (node, kind) for node in index.nodes.values() for kind in node.parts
    }
    for entry in list(block_files(data_dir)):
        if known.pop(Path(entry.path), None) is not None:
            continue
        if entry.name.endswith(TEMP_SUFFIX):
            files.unlink(Path(entry.path))
            sweep.temps += 1
        elif entry.name.endswith(SUFFIX):
            # Its transaction never happened, or its removal was cut short: nobody was promised it.
            files.unlink(Path(entry.path))
            sweep.orphans += 1
    for node, kind in known.values():
        del node.parts[kind]
        node.lost = Fallback.MISSING_BLOCK
    sweep.missing = len(known)
    changed = {node for node, _ in known.values()}
    if gone or changed:
        database.apply([*(rows.delete_node(node) for node in gone), *(rows.update_node(node) for node in changed)])
    return sweep
