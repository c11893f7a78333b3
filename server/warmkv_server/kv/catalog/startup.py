"""Opening a data directory: take it, read the index, put right what a crash left behind, and say what was done."""

from __future__ import annotations

import contextlib
import logging
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from warmkv_server.contract.kv import Fallback, KVLayout
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.settings import CONSTANTS, Settings
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.disk import BLOCKS, QUARANTINE, object_path, quarantined_bytes
from warmkv_server.kv.blocks.files import TEMP_SUFFIX, Files, entries, in_words, is_plain
from warmkv_server.kv.blocks.names import Name
from warmkv_server.kv.blocks.tier import BlockTier, Tidied
from warmkv_server.kv.catalog import commit_log, models, plausible, rows, signing
from warmkv_server.kv.catalog import lock as locking
from warmkv_server.kv.catalog.clock import Clock, TimeSource
from warmkv_server.kv.catalog.commit_log import CommitLog
from warmkv_server.kv.catalog.database import CHECKPOINT_BYTES, INDEX_FILE, READERS_LOCK, Database, Statement
from warmkv_server.kv.catalog.foreign import Foreign
from warmkv_server.kv.catalog.lock import DirectoryLock
from warmkv_server.kv.catalog.manifest import FOLDER, Manifest, encode
from warmkv_server.kv.catalog.manifest_files import UpToDate, bring_up_to_date
from warmkv_server.kv.catalog.models import known_fingerprints
from warmkv_server.kv.catalog.private import make_folder, tighten
from warmkv_server.kv.catalog.rebuild import aside_files
from warmkv_server.kv.catalog.stored_outcomes import StoredOutcomes
from warmkv_server.kv.catalog.takeover import TakeOver
from warmkv_server.kv.catalog.truth import open_index
from warmkv_server.kv.index.index import Agent, Index
from warmkv_server.kv.index.prefix import partly_kept
from warmkv_server.kv.index.records import Fingerprint, Tuning

log = logging.getLogger(__name__)

_NAMED = 20
"""Strange things that a line names at most."""


@dataclass
class Opened:
    """A data directory, ready for use."""

    database: Database
    commits: CommitLog
    index: Index
    clock: Clock
    fingerprint: Fingerprint
    foreign: Foreign
    outcomes: StoredOutcomes
    quarantine_bytes: int
    aside_bytes: int
    manifests: UpToDate


@dataclass
class _Sweep:
    """What was found to be put right.

    Attributes:
        orphans: objects that are to go.
        spared: bytes of objects that no agent references, and that stay.
        strange: what has the name of no object; it is left alone.
    """

    orphans: list[str] = field(default_factory=list)
    spared: int = 0
    strange: list[str] = field(default_factory=list)
    missing: int = 0
    unreferenced: int = 0


def take_directory(data_dir: Path, files: Files) -> DirectoryLock:
    """Make the folders that are missing, and keep others out. Blocking.

    Raises:
        OperatorError
    """
    make_folders(data_dir, files)
    return DirectoryLock(data_dir)


def open_directory(
    lock: DirectoryLock,
    settings: Settings,
    tuning: Tuning,
    layout: KVLayout,
    fingerprint: Fingerprint,
    files: Files,
    tier: BlockTier,
    times: TimeSource | None = None,
) -> Opened:
    """Blocking. Lets go of the lock if it fails.

    Raises:
        OperatorError
    """
    data_dir, limit = settings.data_dir, tuning.quarantine_limit(settings.disk_bytes)
    try:
        tighten(data_dir, _is_own)
        signing.make_key(data_dir)
        small = settings.disk_bytes // 64 if settings.disk_bytes else CHECKPOINT_BYTES
        takeover = TakeOver(data_dir, files, limit)
        from_1 = takeover.begin()
        checkpoint = min(CHECKPOINT_BYTES, small)
        believed = open_index(data_dir, files, tier, checkpoint, limit, from_1)
        database, index, evidence = believed.database, believed.index, believed.evidence
        try:
            takeover.finish()
            fingerprints = known_fingerprints(data_dir, database, index)
            fingerprint = fingerprint.as_known(fingerprints.known, of_old=fingerprints.of_old(index))
            _put_aside_the_implausible(index, layout, fingerprint.digest, database)
            _count_parts(index, layout, fingerprint.digest)
            sweep = _sweep(tier, index, database)
            # Before the files that only older manifests refer to are gone.
            manifests = bring_up_to_date(data_dir, index, database.number, files, evidence, limit)
            tidied = _remove(tier, sweep.orphans)
            _remove_temporary(data_dir, files)
            clock = rows.read_clock(database, index, times)
            foreign = Foreign(fingerprint, fingerprints.known)
            fingerprints.keep(fingerprint, files)
            database.apply(
                [
                    *(rows.put_fingerprint(each) for each in fingerprints.known.values()),
                    rows.put_fingerprint(fingerprint),
                    rows.put_vocabulary(fingerprint.digest, layout.vocabulary),
                    *rows.put_clock(clock.reading()),
                ]
            )
            commits = CommitLog(data_dir, files, small)
            commits.begin(database.number, _lines(manifests.stale, database.number))
            files.sync_folders([data_dir])
            outcomes = StoredOutcomes.read(database, tuning.outcome_bytes)
            kept = quarantined_bytes(data_dir)
            aside = sum(_sizes([*aside_files(data_dir), data_dir / models.FILE_NAME])) + sweep.spared
        except BaseException:
            database.close()
            raise
    except BaseException:
        lock.release()
        raise
    strange = [object_path(data_dir, name) for name in sweep.strange]
    _name_the_strange(data_dir, [*strange, *tidied.strange, *evidence.strange])
    log.info(
        "opened %s: %d agents, %d nodes; removed %d temporary and %d unknown files and %d unreferenced nodes;"
        " %d files are missing; wrote %d manifests and removed %d",
        data_dir,
        len(index.agents),
        len(index.nodes),
        tidied.removed,
        len(sweep.orphans),
        sweep.unreferenced,
        sweep.missing,
        manifests.written,
        manifests.removed,
    )
    foreign.say(index, settings.data_dir)
    return Opened(database, commits, index, clock, fingerprint, foreign, outcomes, kept, aside, manifests)


def make_folders(data_dir: Path, files: Files) -> None:
    """All folders there will ever be, so that no commit has to make one.

    Raises:
        OperatorError
    """
    blocks = data_dir / BLOCKS
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        for folder in (data_dir, data_dir / QUARANTINE, blocks, data_dir / FOLDER):
            make_folder(folder)
        if sum([make_folder(blocks / f"{number:02x}") for number in range(256)]):
            files.sync_folders([blocks, data_dir, data_dir.parent])
    except OSError as error:
        raise OperatorError(
            f"the data directory {data_dir} can't be prepared ({error.strerror}); "
            "give another with --data-dir, or change its permissions"
        ) from error


def _is_own(name: str) -> bool:
    """Whether something in a data directory is the store's, by its name."""
    names = {BLOCKS, QUARANTINE, FOLDER, CONSTANTS, locking.FILE_NAME, "reserve", signing.FILE_NAME, READERS_LOCK}
    return name in names or name.startswith((INDEX_FILE, commit_log.FILE_NAME, models.FILE_NAME))


def _lines(agents: Iterable[Agent], number: int) -> dict[AgentKey, tuple[int, bytes]]:
    """For the log of commits: agents whose manifests the disk has refused."""
    return {agent.key: (number, encode(Manifest.of(agent, number))) for agent in agents}


def _remove(tier: BlockTier, names: Iterable[str]) -> Tidied:
    """What the disk refuses to remove stays until the next start."""
    refused: list[OSError] = []
    tidied = Tidied()
    try:
        tidied = tier.tidy()
    except OSError as error:
        refused.append(error)
    for name in names:
        try:
            tier.delete(name)
        except OSError as error:
            refused.append(error)
    if refused:
        log.warning("the disk refuses to remove %d files that nobody needs: %s", len(refused), refused[0])
    return tidied


def _remove_temporary(data_dir: Path, files: Files) -> None:
    """What a crash has left of small files that were being replaced."""
    for entry in entries(data_dir):
        ours = entry.name.startswith((commit_log.FILE_NAME, models.FILE_NAME)) and entry.name.endswith(TEMP_SUFFIX)
        if ours and is_plain(entry):
            with contextlib.suppress(OSError):  # the next start does it
                files.unlink(Path(entry.path))


def _sizes(paths: Iterable[Path]) -> Iterator[int]:
    for path in paths:
        with contextlib.suppress(OSError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                yield found.st_size


def _name_the_strange(data_dir: Path, strange: list[Path]) -> None:
    strange += [Path(e.path) for e in entries(data_dir / QUARANTINE) if not is_plain(e)]
    strange += [Path(e.path) for e in entries(data_dir) if not _is_own(e.name)]
    strange += [Path(e.path) for e in entries(data_dir) if e.name.startswith(INDEX_FILE) and not is_plain(e)]
    if strange:
        names = ", ".join(in_words(path.relative_to(data_dir)) for path in strange[:_NAMED])
        more = f" and {len(strange) - _NAMED} more" * (len(strange) > _NAMED)
        log.warning("left alone in %s, for they are not files of WarmKV: %s%s", in_words(data_dir), names, more)


def _put_aside_the_implausible(index: Index, layout: KVLayout, fingerprint: str, database: Database) -> None:
    """Agents with values that can't be are no agents any more. Their block files and manifests stay, unused."""
    found = list(index.implausible)
    for agent in list(index.agents.values()):
        ours = agent.fingerprint == fingerprint
        wrong = plausible.token_violation(agent.tokens, layout.vocabulary if ours else None)
        if wrong is not None:
            index.remove_agent(agent)
            found.append((agent, wrong))
    statements: list[Statement] = []
    for agent, wrong in found:
        log.error("agent %r of tenant %r is damaged and was put aside: %s", agent.agent_id, agent.tenant, wrong)
        statements += rows.delete_agent(agent.incarnation)
        names = (name for node in agent.all_nodes() if not node.refs for name in node.object_names())
        statements += [rows.spare(name) for name in names]
    if statements:
        database.apply(statements)


def _count_parts(index: Index, layout: KVLayout, fingerprint: str) -> None:
    """Which parts each agent needs follows from its boundaries. Those of other models are left alone."""
    for agent in index.agents.values():
        if agent.fingerprint == fingerprint:
            boundaries = {len(agent.tokens), agent.previous, *agent.kept} - {0}
            agent.partial = partly_kept(layout, agent.nodes, boundaries)
        else:
            agent.partial = {(node, kind) for node in agent.nodes for kind in node.parts}
        for node, kind in agent.partial:
            node.part_refs[kind] += 1


def _sweep(tier: BlockTier, index: Index, database: Database) -> _Sweep:
    """Put the index right; what is to be removed is left to the caller."""
    sweep = _Sweep()
    gone = [node for node in index.nodes.values() if not node.refs]
    for node in gone:
        del index.nodes[node.id]
    sweep.unreferenced = len(gone)
    known = {n.object_name(kind, part): (n, kind) for n in index.nodes.values() for kind, part in n.parts.items()}
    spared = rows.read_spared(database)
    for name, nbytes in tier.list():
        if known.pop(name, None) is not None:
            continue
        if Name.parse(name) is None:
            sweep.strange.append(name)
        elif name in spared:
            sweep.spared += nbytes
        else:
            # Its transaction never happened, or its removal was cut short: nobody was promised it.
            sweep.orphans.append(name)
    for node, kind in known.values():
        del node.parts[kind]
        node.lost = Fallback.MISSING_BLOCK
    sweep.missing = len(known)
    changed = {node for node, _ in known.values()}
    if gone or changed:
        database.apply([*(rows.delete_node(node) for node in gone), *(rows.update_node(node) for node in changed)])
    return sweep
