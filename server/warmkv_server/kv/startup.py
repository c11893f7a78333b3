"""Opening a data directory: take it, read the index, put right what a crash left behind, and say what was done."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from warmkv_server.errors import OperatorError
from warmkv_server.kv import journal, rows
from warmkv_server.kv.blockfile import SUFFIX
from warmkv_server.kv.boundaries import in_window
from warmkv_server.kv.clock import Clock, TimeSource
from warmkv_server.kv.core import BLOCKS, QUARANTINE, block_path
from warmkv_server.kv.files import TEMP_SUFFIX, Files
from warmkv_server.kv.foreign import Foreign
from warmkv_server.kv.index import Index
from warmkv_server.kv.journal import CHECKPOINT_BYTES, Database, JournalDamaged
from warmkv_server.kv.lock import DirectoryLock
from warmkv_server.kv.manifest import FOLDER
from warmkv_server.kv.manifests import UpToDate, bring_up_to_date
from warmkv_server.kv.outcomes import StoredOutcomes
from warmkv_server.kv.rebuild import aside_files, holds_contexts, rebuild_index
from warmkv_server.kv.records import Fingerprint, StoreSettings
from warmkv_server.kv.types import Fallback, KVLayout

log = logging.getLogger(__name__)


@dataclass
class Opened:
    """A data directory, ready for use."""

    lock: DirectoryLock
    database: Database
    index: Index
    clock: Clock
    foreign: Foreign
    outcomes: StoredOutcomes
    quarantine_bytes: int
    aside_bytes: int
    manifests: UpToDate


@dataclass
class _Sweep:
    """What was found to be put right.

    Attributes:
        temps, orphans: files that are to go.
    """

    temps: list[Path] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    missing: int = 0
    unreferenced: int = 0


def open_directory(
    settings: StoreSettings,
    layout: KVLayout,
    fingerprint: Fingerprint,
    files: Files,
    times: TimeSource | None = None,
) -> Opened:
    """Blocking.

    Raises:
        OperatorError
    """
    make_folders(settings.data_dir, files)
    lock = DirectoryLock(settings.data_dir)
    try:
        database, index = _open_index(settings, files)
        try:
            _count_windows(index, layout, fingerprint.digest)
            sweep = _sweep(settings.data_dir, index, database)
            # Before the files that only older manifests refer to are gone.
            manifests = bring_up_to_date(settings.data_dir, index, files)
            for path in (*sweep.temps, *sweep.orphans):
                files.unlink(path)
            clock = rows.read_clock(database, index, times)
            foreign = Foreign(fingerprint, rows.read_fingerprints(database))
            database.apply([rows.insert_fingerprint(fingerprint), *rows.put_clock(clock.reading())])
            files.sync_folders([settings.data_dir])
            outcomes = StoredOutcomes.read(database, settings.outcome_bytes)
            kept = sum(entry.stat().st_size for entry in (settings.data_dir / QUARANTINE).iterdir())
            aside = sum(path.stat().st_size for path in aside_files(settings.data_dir))
        except BaseException:
            database.close()
            raise
    except BaseException:
        lock.release()
        raise
    log.info(
        "opened %s: %d agents, %d nodes; removed %d temporary and %d unknown files and %d unreferenced nodes;"
        " %d files are missing; wrote %d manifests and removed %d",
        settings.data_dir,
        len(index.agents),
        len(index.nodes),
        len(sweep.temps),
        len(sweep.orphans),
        sweep.unreferenced,
        sweep.missing,
        manifests.written,
        manifests.removed,
    )
    foreign.say(index, settings.data_dir)
    return Opened(lock, database, index, clock, foreign, outcomes, kept, aside, manifests)


def make_folders(data_dir: Path, files: Files) -> None:
    """All folders there will ever be, so that no commit has to make one.

    Raises:
        OperatorError
    """
    blocks = data_dir / BLOCKS
    try:
        (data_dir / QUARANTINE).mkdir(parents=True, exist_ok=True)
        blocks.mkdir(exist_ok=True)
        (data_dir / FOLDER).mkdir(exist_ok=True)
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


def _open_index(settings: StoreSettings, files: Files) -> tuple[Database, Index]:
    """The index, rebuilt if it is lost."""
    path = settings.data_dir / journal.FILE_NAME
    try:
        return _read_index(settings, create=not holds_contexts(settings.data_dir))
    except JournalDamaged as error:
        log.error("the index %s is lost (%s); building it anew from the files", path, error)
    rebuilt = rebuild_index(settings.data_dir, files, settings.quarantine_limit, "damaged")
    kept = f" (the damaged index is kept as {rebuilt.aside.name})" if rebuilt.aside is not None else ""
    log.warning("the index %s was rebuilt%s: %s", path, kept, rebuilt.summary())
    return _read_index(settings, create=False)


def _read_index(settings: StoreSettings, *, create: bool) -> tuple[Database, Index]:
    path = settings.data_dir / journal.FILE_NAME
    small = settings.disk_bytes // 64 if settings.disk_bytes else CHECKPOINT_BYTES
    database = Database(path, settings.durability, min(CHECKPOINT_BYTES, small), create=create)
    try:
        return database, rows.read_index(database)
    except BaseException:
        database.close()
        raise


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


def _sweep(data_dir: Path, index: Index, database: Database) -> _Sweep:
    """Put the index right; what is to be removed is left to the caller."""
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
            sweep.temps.append(Path(entry.path))
        elif entry.name.endswith(SUFFIX):
            # Its transaction never happened, or its removal was cut short: nobody was promised it.
            sweep.orphans.append(Path(entry.path))
    for node, kind in known.values():
        del node.parts[kind]
        node.lost = Fallback.MISSING_BLOCK
    sweep.missing = len(known)
    changed = {node for node, _ in known.values()}
    if gone or changed:
        database.apply([*(rows.delete_node(node) for node in gone), *(rows.update_node(node) for node in changed)])
    return sweep
