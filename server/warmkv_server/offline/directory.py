"""A data directory without its server: seen as it was last committed, or taken to change it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from warmkv_server.contract.kv import PartKind
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.settings import Settings
from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.disk import DiskTier
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog import commit_log, lock, rows, signing
from warmkv_server.kv.catalog.clock import Clock
from warmkv_server.kv.catalog.commit_log import CommitLog
from warmkv_server.kv.catalog.database import INDEX_FILE, Database, JournalDamaged, read_number
from warmkv_server.kv.catalog.evidence import Evidence, gather
from warmkv_server.kv.catalog.lock import DirectoryLock
from warmkv_server.kv.catalog.manifest_files import bring_up_to_date
from warmkv_server.kv.catalog.readonly import ReadOnlyDatabase
from warmkv_server.kv.catalog.rebuild import holds_contexts
from warmkv_server.kv.catalog.startup import make_folders
from warmkv_server.kv.catalog.takeover import old_files
from warmkv_server.kv.catalog.truth import believe
from warmkv_server.kv.index.index import Agent, Index, Node
from warmkv_server.kv.index.records import Fingerprint, Tuning

_REBUILD = "`warmkv store rebuild-index` builds it anew, and so does a server that starts"


@dataclass(frozen=True)
class View:
    """What the index said at one moment.

    Attributes:
        fingerprints: by digest; of all models that the directory was served with.
        clock: the directory's time.
        vocabularies: by digest; token ids are below. Not all models' are known.
        not_the_last: why the index is older than what else the directory says, if it is.
    """

    data_dir: Path
    index: Index
    fingerprints: Mapping[str, Fingerprint]
    clock: Clock
    vocabularies: Mapping[str, int] = field(default_factory=dict)
    not_the_last: str | None = None

    @property
    def tier(self) -> DiskTier:
        return tier_of(self.data_dir)


@dataclass(frozen=True)
class Taken(View):
    """A directory that nobody else changes meanwhile."""

    database: Database = field(kw_only=True)
    files: Files = field(kw_only=True)

    @property
    def tier(self) -> DiskTier:
        return tier_of(self.data_dir, self.files)

    def settle(self) -> None:
        """Have every agent's manifest in its file, so that what is removed afterwards stays removed."""
        _settle(self, gather(self.data_dir))


def look(data_dir: Path) -> View:
    """Beside a running server or without one. Changes nothing.

    Raises:
        OperatorError: there is no readable index.
    """
    path = _index_path(data_dir)
    told = commit_log.read(data_dir)  # Before the index: a server writes them in the other order.
    try:
        with ReadOnlyDatabase(path) as database:
            index, (number, _) = rows.read_index(database), read_number(database)
            return View(
                data_dir,
                index,
                rows.read_fingerprints(database),
                rows.read_clock(database, index),
                rows.read_vocabularies(database),
                Evidence(told=told).against(Index(), number),
            )
    except JournalDamaged as error:
        raise _damaged(path, error) from error


@contextlib.contextmanager
def take(data_dir: Path) -> Iterator[Taken]:
    """Keep servers out for the block. What is changed is as durable as a server's commits.

    Raises:
        OperatorError: there is no readable index, or another process has the directory.
    """
    path = _index_path(data_dir)
    with locked(data_dir), _open_index(path) as database:
        try:
            evidence = gather(data_dir)
            believed = believe(database, evidence)
            clock = rows.read_clock(database, believed.index)
            fingerprints, vocabularies = rows.read_fingerprints(database), rows.read_vocabularies(database)
        except JournalDamaged as error:
            raise _damaged(path, error) from error
        headroom = Settings.headroom_bytes
        files, before = Files(Durability.FULL, headroom), database.number
        taken = Taken(data_dir, believed.index, fingerprints, clock, vocabularies, database=database, files=files)
        try:
            yield taken
        finally:
            if database.number != before:
                _renew_manifests(taken)


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    held = DirectoryLock(data_dir)
    try:
        yield
    finally:
        held.release()


def make(data_dir: Path) -> None:
    """Have an empty data directory where there is none.

    Raises:
        OperatorError
    """
    if is_new(data_dir):
        make_folders(data_dir, Files(Durability.FULL))
        with locked(data_dir), _open_index(data_dir / INDEX_FILE):
            signing.make_key(data_dir)


def is_new(data_dir: Path) -> bool:
    """Whether nothing of a data directory is there."""
    return not (data_dir / INDEX_FILE).exists() and not _holds_contexts(data_dir)


@contextlib.contextmanager
def _open_index(path: Path) -> Iterator[Database]:
    try:
        database = Database(path, Durability.FULL)
    except JournalDamaged as error:
        raise _damaged(path, error) from error
    try:
        yield database
    finally:
        database.close()


def in_use(data_dir: Path) -> bool:
    """Whether a server, or a command that changes files, has the directory at this moment."""
    try:
        fd = os.open(data_dir / lock.FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def tier_of(data_dir: Path, files: Files | None = None) -> DiskTier:
    """The blocks of a directory; to look at, unless files are given."""
    return DiskTier(data_dir, files or Files(Durability.FULL), Tuning.quarantine_bytes)


def _holds_contexts(data_dir: Path) -> bool:
    return any(old_files(data_dir)) or holds_contexts(data_dir, tier_of(data_dir))


def find_agent(view: View, tenant: str, agent_id: str) -> Agent:
    """
    Raises:
        OperatorError: there is none of this name; says of which tenants there is one.
    """
    agent = view.index.agents.get(AgentKey(tenant, agent_id))
    if agent is None:
        others = [repr(owner) for owner, name in view.index.agents if name == agent_id]
        hint = f"; tenant {' and '.join(others)} has one: give --tenant" if others else "; `warmkv store ls` lists all"
        of = f" of tenant {tenant!r}" if tenant else ""
        raise OperatorError(f"there is no agent {agent_id!r}{of} in {view.data_dir}{hint}")
    return agent


def disk_bytes(nodes: Iterable[Node]) -> int:
    return sum(node.disk_bytes for node in nodes)


def usable_tokens(agent: Agent, bad: Mapping[bytes, frozenset[PartKind]] | None = None) -> int:
    """How many of its tokens, from the first, have KV that every layer can use at most.

    Args:
        bad: parts, by node id, not to count on.
    """
    for node in agent.nodes:
        if PartKind.APPEND not in node.parts or (bad and PartKind.APPEND in bad.get(node.id, ())):
            return node.start
    return len(agent.tokens)


def _index_path(data_dir: Path) -> Path:
    path = data_dir / INDEX_FILE
    if path.is_file():
        return path
    if _holds_contexts(data_dir):
        raise OperatorError(f"the index {path} is missing; {_REBUILD}")
    raise OperatorError(f"{data_dir} is not a data directory of WarmKV; give the one that was served with --data-dir")


def _renew_manifests(taken: Taken) -> None:
    """Of the agents as they are now."""
    try:
        _settle(replace(taken, index=rows.read_index(taken.database)), gather(taken.data_dir))
    except OSError as error:
        raise OperatorError(
            f"the change is made, but the disk refuses the agents' manifests ({error.strerror or error}); "
            "the next start of a server puts them right"
        ) from error


def _settle(taken: Taken, evidence: Evidence) -> None:
    number = taken.database.number
    limit = Tuning.quarantine_bytes
    found = bring_up_to_date(taken.data_dir, taken.index, number, taken.files, evidence, limit)
    if found.stale:
        raise OSError(errno.EIO, "the manifests can't be written")
    commits = CommitLog(taken.data_dir, taken.files)
    commits.begin(number)
    commits.close()


def _damaged(path: Path, error: JournalDamaged) -> OperatorError:
    return OperatorError(f"the index {path} is damaged ({error}); {_REBUILD}")
