"""Garbage collection by reference count: what no agent references any more goes, rows first, files second.

So no row ever lacks its file for long, and a crash in between leaves only files that the next start sweeps.

What the disk refuses to take away counts as there, and is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from warmkv_server.contract.kv import Fallback
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.index.index import Node
from warmkv_server.kv.tasks.core import Core, node_of

log = logging.getLogger(__name__)


class Collector:
    """At most one collection runs at a time."""

    def __init__(self, core: Core, was_refused: Callable[[], object]) -> None:
        """
        Args:
            was_refused: is called when there is something to `retry`, in a while.
        """
        self._core = core
        self._was_refused = was_refused
        self._suspects: dict[Node, None] = {}
        self._removing: set[bytes] = set()
        self._running: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._refused = False
        """The index has refused to forget what is suspected: `retry` is to try again."""

    def suspect(self, nodes: Iterable[Node]) -> None:
        """These have lost a reference, a pin, or the need for a part: look at them soon."""
        for node in nodes:
            if not node.pins and (not node.refs or node.spare_parts()):
                self._suspects[node] = None
        if self._suspects and self._running is None and not self._refused:
            self._running = asyncio.create_task(self._run())

    async def drop_files(
        self, nodes: Iterable[Node], reason: Fallback, before_unlinking: Callable[[], Awaitable[None]]
    ) -> None:
        """Give up the files of nodes that agents still reference; what is in RAM stays usable.

        Args:
            before_unlinking: is awaited when the rows don't have the files any more.

        Raises:
            OSError: the disk refuses; nothing has changed.
        """
        core = self._core
        dropped = {node: dict(node.parts) for node in nodes if node.parts}
        files = {n.object_name(kind, part): part.nbytes for n, parts in dropped.items() for kind, part in parts.items()}
        ids = {node.id for node in dropped}
        self._removing |= ids
        before = {node: node.lost for node in dropped}
        core.accounts.go(files)
        for node, parts in dropped.items():
            for kind in parts:
                core.accounts.lost(node, kind)
            node.lost = reason
        try:
            try:
                await core.journal.remove([rows.update_node(node) for node in dropped if node.saved])
            except BaseException:
                core.accounts.gone(files)
                for node, parts in dropped.items():
                    for kind, part in parts.items():
                        core.accounts.wrote(node, kind, part)
                    node.lost = before[node]
                raise
            await before_unlinking()
            await self._unlink(files)
        finally:
            self._removing -= ids
            self._rest()

    def removing(self, nodes: Iterable[Node]) -> bool:
        """Whether files under one of these ids are being removed just now."""
        return any(node.id in self._removing for node in nodes)

    async def idle(self) -> None:
        """Wait until nothing is being removed."""
        while self._running is not None or self._removing:
            self._idle.clear()
            await self._idle.wait()

    async def retry(self) -> bool:
        """Try once more what the disk refused to take away. Whether nothing is left of it."""
        await self.idle()
        core = self._core
        # A node may need the file again: whoever is about to write it has pinned the node, and doesn't look here.
        left = {
            name: nbytes
            for name, nbytes in core.accounts.going.items()
            if (node := core.index.nodes.get(node_of(name))) is None or not node.pins
        }
        ids = {node_of(name) for name in left}
        self._removing |= ids
        try:
            with contextlib.suppress(OSError):
                await self._unlink(left)
        finally:
            self._removing -= ids
            self._idle.set()
        self._refused = False
        self.suspect(())
        await self.idle()
        return not self.refused

    @property
    def refused(self) -> bool:
        """Whether the disk has refused to take something away that is still there."""
        return self._refused or (bool(self._core.accounts.going) and not self._removing)

    async def _unlink(self, files: Mapping[str, int]) -> None:
        """Remove files that have been given to `Accounts.go`.

        Raises:
            OSError: the disk refuses the first of those that are left.
        """
        removed: list[str] = []
        try:
            await self._core.writing(_unlink_all, self._core, files, removed)
        finally:
            self._core.accounts.gone(removed)

    async def _run(self) -> None:
        try:
            while self._suspects and not self._refused:
                suspects, self._suspects = list(self._suspects), {}
                gone = [node for node in suspects if not node.refs and not node.pins]
                slimmer = [node for node in suspects if node.refs and not node.pins and node.spare_parts()]
                if (gone or slimmer) and not await self._remove(gone, slimmer):
                    self._refused = True
                    self._suspects |= dict.fromkeys(suspects)
        finally:
            self._running = None
            self._rest()

    def _rest(self) -> None:
        self._idle.set()
        if self.refused:
            self._was_refused()

    async def _remove(self, gone: list[Node], slimmer: list[Node]) -> bool:
        """Remove nodes, and unneeded parts of others. False if the index refuses; all is as before then."""
        core = self._core
        files = {node.object_name(kind, part): part.nbytes for node in gone for kind, part in node.parts.items()}
        spare = [(node, kind, core.accounts.lost(node, kind)) for node in slimmer for kind in node.spare_parts()]
        files |= {node.object_name(kind, part): part.nbytes for node, kind, part in spare}
        core.accounts.go(files)
        for node in gone:
            core.accounts.leave(node)
        ids = {node.id for node in (*gone, *slimmer)}
        self._removing |= ids
        try:
            try:
                await self._forget(gone, slimmer)
            except Exception as error:
                _say("the index refuses to forget blocks that nobody needs", error)
                core.accounts.gone(files)
                for node in gone:
                    core.accounts.enter(node)
                for node, kind, part in spare:
                    core.accounts.wrote(node, kind, part)
                return False
            for node in gone:
                core.hot.drop(node, unsaved_too=True)
            for node, kind, _ in spare:
                core.hot.drop(node, kind)
            try:
                await self._unlink(files)
            except Exception as error:
                _say("the disk refuses to remove files that nobody needs", error)
            return True
        finally:
            self._removing -= ids

    async def _forget(self, gone: list[Node], slimmer: list[Node]) -> None:
        """Have the journal know it."""
        statements = [rows.delete_node(node) for node in gone if node.saved]
        statements += [rows.update_node(node) for node in slimmer if node.saved]
        dirty = [node for node in slimmer if node.saved and node.dirty]
        for node in dirty:
            node.dirty = False  # Now, not afterwards, as in a commit.
        try:
            if statements:
                await self._core.journal.remove(statements)
        except BaseException:
            for node in dirty:
                node.dirty = True
            raise


def _say(what: str, error: Exception) -> None:
    log.warning("%s; it is tried again: %s", what, error, exc_info=not isinstance(error, OSError))


def _unlink_all(core: Core, names: Iterable[str], removed: list[str]) -> None:
    """`removed` has those that are gone, also where the tier refuses another."""
    for name in names:
        core.tier.delete(name)
        removed.append(name)
