"""Building a lost index anew, from the agents' manifests, the log of commits and the headers of the block files.

Of what is known of an agent the newest counts that can be borne out. An old index is believed only in what it says of
agents that something else says are alive.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from warmkv_server.contract.kv import PartKind
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.disk import QUARANTINE, quarantine
from warmkv_server.kv.blocks.files import Files, entries, is_plain, open_file
from warmkv_server.kv.blocks.tier import BlockTier
from warmkv_server.kv.catalog import commit_log, rows
from warmkv_server.kv.catalog.builder import Builder, NotRebuildable
from warmkv_server.kv.catalog.clock import Clock
from warmkv_server.kv.catalog.database import INDEX_FILE, Database, Statement
from warmkv_server.kv.catalog.evidence import Evidence
from warmkv_server.kv.catalog.manifest import FOLDER, SUFFIX, Manifest, file_name
from warmkv_server.kv.index.index import Index

log = logging.getLogger(__name__)

_NEW = INDEX_FILE + ".new"
_LOG_COPY = "-wal.found"
_SQLITE_FILES = ("", "-wal", "-shm")
_NAMED = 100
"""Agents that a sentence names at most, of those that came back."""


@dataclass
class Rebuilt:
    """What came back, and what did not.

    Attributes:
        aside: where the old index is kept, if there was one.
        without_kv: tokens that are known, but whose block files are gone; they are computed anew when needed.
        left_out: agents that could not be rebuilt, and why.
        unreadable: manifests that could not be read, and why; so nobody knows whose they were.
    """

    aside: Path | None = None
    agents: int = 0
    tokens: int = 0
    without_kv: int = 0
    forward: list[str] = field(default_factory=list)
    older: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)
    unclaimed: int = 0

    def summary(self) -> str:
        """One sentence or two for people."""
        text = f"{self.agents} agents with {self.tokens} tokens came back"
        if self.without_kv:
            text += f", {self.without_kv} of them without KV, which is computed anew when needed"
        text += "; the outcomes of old request ids did not"
        if self.forward:
            more = f" and {len(self.forward) - _NAMED} more" * (len(self.forward) > _NAMED)
            text += f"; restored beyond what the index had: {', '.join(self.forward[:_NAMED])}{more}"
        if self.older:
            text += f"; {len(self.older)} came back as before their last commit: {', '.join(self.older)}"
        if self.left_out:
            text += f"; {len(self.left_out)} agents did not: {', '.join(self.left_out)}"
        if self.gone:
            text += f"; {len(self.gone)} agents that only the index had stay deleted: {', '.join(self.gone)}"
        if self.unreadable:
            names = ", ".join(f"{path.name} ({why})" for path, why in self.unreadable.items())
            text += f"; {len(self.unreadable)} manifests can't be read: {names}"
        if self.unclaimed:
            text += f"; {self.unclaimed} block files that no agent references stay until `warmkv store gc`"
        return text


def holds_contexts(data_dir: Path, tier: BlockTier) -> bool:
    """Whether there is anything that an index ought to know."""
    manifests = any(entry.name.endswith(SUFFIX) and is_plain(entry) for entry in entries(data_dir / FOLDER))
    return manifests or next(tier.list(), None) is not None or bool(commit_log.read(data_dir).agents)


def rebuild_index(
    data_dir: Path,
    files: Files,
    tier: BlockTier,
    quarantine_bytes: int,
    why: str,
    evidence: Evidence,
    old: Index | None = None,
) -> Rebuilt:
    """Build an index from what the files say, and put it in place; the old one is kept beside it. Blocking.

    The directory's lock is held. A crash at any moment leaves the old index, or none, or the whole new one. No block
    file is removed, now or later, but by an operator's `warmkv store gc`.

    Args:
        why: a word for the old one's new name.
        old: the index that is not believed, as far as it could be read.

    Raises:
        OperatorError: there are no manifests to build it from, or the disk refuses.
    """
    path = data_dir / INDEX_FILE
    found = Rebuilt(unreadable=dict(evidence.unreadable))
    known = dict(evidence.living())
    if not known and not evidence.told.agents and holds_contexts(data_dir, tier):
        raise OperatorError(
            f"the index {path} can't be rebuilt, because {data_dir / FOLDER} has no readable manifest and the block "
            "files alone don't say whose they are; put the index back from a backup, or move the data directory away "
            "to begin with an empty one"
        )
    _add_what_the_old_one_says(known, old, evidence, found)
    try:
        used = (manifest.last_used for manifests in known.values() for manifest in manifests)
        builder = Builder(data_dir, tier, Clock(used=used).now())
        for key, manifests in known.items():
            _bring_back(builder, key, manifests, old, found)
            path_of = data_dir / FOLDER / file_name(*key)
            if key not in builder.index.agents and path_of in evidence.manifests:
                _put_away(data_dir, path_of, files, quarantine_bytes)
        for name, version in builder.bad.items():
            tier.set_aside(name, version)
        for bad in found.unreadable:
            _put_away(data_dir, bad, files, quarantine_bytes)
        spared = _unclaimed(tier, builder.index)
        found.unclaimed = len(spared)
        number = max(evidence.number, *(m.number for ms in known.values() for m in ms), 0)
        _write(data_dir / _NEW, files, builder.index, number, spared)
        found.aside = _put_aside(path, why)
        (data_dir / _NEW).rename(path)
        files.sync_folders([data_dir])
    except OSError as error:
        raise OperatorError(
            f"the disk refuses the new index of {data_dir} ({error.strerror or error}); free space, and try again"
        ) from error
    return found


def _add_what_the_old_one_says(
    known: dict[AgentKey, list[Manifest]], old: Index | None, evidence: Evidence, found: Rebuilt
) -> None:
    """Behind what is newer; and of agents whose manifest is there but can't be read."""
    illegible = {path.name for path in evidence.unreadable}
    for key, agent in old.agents.items() if old is not None else ():
        if key in known:
            known[key].append(Manifest.of(agent))
        elif file_name(*key) in illegible and not isinstance(evidence.told.agents.get(key), int):
            known[key] = [Manifest.of(agent)]
        else:
            found.gone.append(_name(key))


def _bring_back(
    builder: Builder, key: AgentKey, manifests: Sequence[Manifest], old: Index | None, found: Rebuilt
) -> None:
    """The newest state of an agent that the files bear out."""
    reasons: list[str] = []
    for manifest in manifests:
        try:
            agent = builder.add(manifest)
        except NotRebuildable as reason:
            reasons.append(str(reason))
            continue
        found.agents += 1
        found.tokens += len(agent.tokens)
        found.without_kv += sum(node.count for node in agent.nodes if PartKind.APPEND not in node.parts)
        before = old.agents.get(key) if old is not None else None
        if reasons:
            found.older.append(f"{_name(key)} at revision {agent.revision} ({reasons[0]})")
        elif old is not None and (before is None or before.revision < agent.revision):
            found.forward.append(f"{_name(key)} at revision {agent.revision}")
        return
    found.left_out.append(f"{_name(key)} ({reasons[0]})")


def _unclaimed(tier: BlockTier, index: Index) -> list[str]:
    """Names of the objects that no agent has."""
    known = {name for node in index.nodes.values() for name in node.object_names()}
    return sorted(name for name, _ in tier.list() if name not in known)


def _write(path: Path, files: Files, index: Index, number: int, spared: Iterable[str]) -> None:
    """A whole index as one file."""
    for end in _SQLITE_FILES:
        path.with_name(path.name + end).unlink(missing_ok=True)
    statements: list[Statement] = [rows.put_node(node) for node in index.nodes.values()]
    for agent in index.agents.values():
        statements += rows.insert_agent(agent)
    statements += [rows.spare(name) for name in spared]
    database = Database(path, files.durability)
    try:
        database.apply(statements, number + 1)
    finally:
        database.close()


def keep_log(path: Path) -> Path | None:
    """A copy of an index's log, taken before SQLite opens it and drops what it doesn't believe."""
    wal, copy = path.with_name(path.name + "-wal"), path.with_name(path.name + _LOG_COPY)
    with contextlib.suppress(OSError):
        copy.unlink(missing_ok=True)
        with os.fdopen(open_file(wal), "rb") as log_file, os.fdopen(Files(Durability.NONE).create(copy), "wb") as kept:
            shutil.copyfileobj(log_file, kept, 1 << 20)
        return copy
    return None


def _put_aside(path: Path, why: str) -> Path | None:
    """Keep what is left of an index under another name, with its log as it was found."""
    aside = path.with_name(f"{path.name}.{why}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    for end in _SQLITE_FILES:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    with contextlib.suppress(FileNotFoundError):
        path.with_name(path.name + _LOG_COPY).rename(aside.with_name(aside.name + "-wal"))
    return aside if aside.exists() else None


def aside_files(data_dir: Path) -> list[Path]:
    """Of indexes that were kept, with the files that SQLite had beside them."""
    begins = f"{INDEX_FILE}."
    return sorted(
        Path(e.path) for e in entries(data_dir) if e.name.startswith(begins) and "-" in e.name and is_plain(e)
    )


def _put_away(data_dir: Path, path: Path, files: Files, limit: int) -> None:
    (data_dir / QUARANTINE).mkdir(exist_ok=True)
    quarantine(files, path, data_dir / QUARANTINE, limit)


def _name(key: AgentKey) -> str:
    tenant, agent_id = key
    return f"{agent_id!r}" + (f" of tenant {tenant!r}" if tenant else "")
