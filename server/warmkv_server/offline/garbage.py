"""`warmkv store gc`: what nothing references, and what an operator names. Pinned agents only if asked for.

What goes is found first, so that a dry run tells exactly what a run does. Rows go before files, as in a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.disk import QUARANTINE, block_files, is_object, object_path
from warmkv_server.kv.blocks.files import TEMP_SUFFIX, entries, is_plain
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.database import Statement
from warmkv_server.kv.catalog.manifest import FOLDER, file_name
from warmkv_server.kv.catalog.rebuild import aside_files
from warmkv_server.kv.index.index import Agent, Node
from warmkv_server.offline.directory import Taken, View


@dataclass(frozen=True)
class Selection:
    """
    Attributes:
        unused_for: seconds; agents last used before go.
        fingerprint: digest; agents of this model and settings go. With `unused_for`, those to which both apply.
        pinned_too: pinned agents go like the others.
        quarantine: the quarantine is emptied, and indexes that were put aside as damaged or replaced go.
    """

    unused_for: float | None = None
    fingerprint: str | None = None
    pinned_too: bool = False
    quarantine: bool = False

    def takes(self, agent: Agent, now: float) -> bool:
        """Whether it goes, unless it is pinned."""
        if self.unused_for is None and self.fingerprint is None:
            return False
        unused = self.unused_for is None or agent.last_used < now - self.unused_for
        return unused and self.fingerprint in (None, agent.fingerprint)


@dataclass
class Waste:
    """What goes. Files are with their bytes.

    Attributes:
        temporary: what a crash left behind.
        unknown: block files that the index doesn't have.
        agents: the ones chosen.
        kept: pinned ones that would have been chosen.
        nodes: blocks that no agent references, or none but the chosen.
        blocks: the files of these nodes.
        aside: indexes that were put aside, with what SQLite had beside them.
        now: of the directory's time.
    """

    temporary: dict[Path, int] = field(default_factory=dict)
    unknown: dict[Path, int] = field(default_factory=dict)
    agents: list[Agent] = field(default_factory=list)
    kept: list[Agent] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    blocks: dict[Path, int] = field(default_factory=dict)
    quarantine: dict[Path, int] = field(default_factory=dict)
    aside: dict[Path, int] = field(default_factory=dict)
    now: float = 0.0

    @property
    def files(self) -> Iterator[tuple[Path, int]]:
        for files in (self.temporary, self.unknown, self.blocks, self.quarantine, self.aside):
            yield from files.items()

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files)


def find_waste(view: View, selection: Selection) -> Waste:
    """Takes the chosen agents out of the view, which is of no other use afterwards."""
    index = view.index
    waste = Waste()
    known = {object_path(view.data_dir, name) for node in index.nodes.values() for name in node.object_names()}
    for entry in block_files(view.data_dir):
        path = Path(entry.path)
        if path in known or not is_plain(entry):
            continue
        if entry.name.endswith(TEMP_SUFFIX):
            waste.temporary[path] = _size(path)
        elif is_object(entry):
            waste.unknown[path] = _size(path)
    waste.now = now = view.clock.now()
    for agent in list(index.agents.values()):
        if selection.takes(agent, now):
            (waste.kept if agent.pinned and not selection.pinned_too else waste.agents).append(agent)
    for agent in waste.agents:
        index.remove_agent(agent)
    spared = {node for agent, _ in index.implausible for node in agent.all_nodes()}
    waste.nodes = [node for node in index.nodes.values() if not node.refs and node not in spared]
    paths = (object_path(view.data_dir, name) for node in waste.nodes for name in node.object_names())
    waste.blocks = {path: _size(path) for path in paths if path.is_file()}
    if selection.quarantine:
        put_away = (Path(entry.path) for entry in entries(view.data_dir / QUARANTINE) if is_plain(entry))
        waste.quarantine = {path: _size(path) for path in put_away}
        waste.aside = {path: _size(path) for path in aside_files(view.data_dir)}
    return waste


def remove(taken: Taken, waste: Waste, selection: Selection) -> None:
    """
    Raises:
        OperatorError: the disk refuses. What is gone then was to go, and the next run removes the rest.
    """
    statements: list[Statement] = [rows.spare_none()] if waste.unknown else []
    for agent in waste.agents:
        statements += rows.delete_agent(agent.incarnation)
    statements += [rows.delete_node(node) for node in waste.nodes]
    if selection.fingerprint is not None and not _in_use(taken, waste, selection.fingerprint):
        statements.append(rows.delete_fingerprint(selection.fingerprint))
    try:
        if waste.agents:
            # As a server does it: the manifest before the row, so that no lost index brings an agent back.
            taken.settle()
            for agent in waste.agents:
                taken.files.unlink(taken.data_dir / FOLDER / file_name(*agent.key))
            taken.files.sync_folders([taken.data_dir / FOLDER])
        if statements:
            taken.database.remove(statements)
        for path, _ in waste.files:
            taken.files.unlink(path)
    except OSError as error:
        raise OperatorError(f"the disk refuses to remove what nobody needs ({error.strerror or error})") from error


def full_digest(view: View, prefix: str) -> str:
    """The one fingerprint that begins so.

    Raises:
        OperatorError: there is none, or more than one.
    """
    digests = {*view.fingerprints, *(agent.fingerprint for agent in view.index.agents.values())}
    found = sorted(digest for digest in digests if prefix and digest.startswith(prefix))
    if len(found) != 1:
        what = "no fingerprint begins" if not found else f"{len(found)} fingerprints begin"
        raise OperatorError(f"{what} with {prefix!r} in {view.data_dir}; `warmkv store ls` lists them")
    return found[0]


def _in_use(taken: Taken, waste: Waste, fingerprint: str) -> bool:
    left: Iterable[Agent | Node] = (*taken.index.agents.values(), *(set(taken.index.nodes.values()) - {*waste.nodes}))
    return any(each.fingerprint == fingerprint for each in left)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
