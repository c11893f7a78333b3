"""Taking away what no agent references any more: rows first, files second, so that no row ever lacks its file for long
and a crash in between leaves only files that the next start sweeps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from warmkv_server.kv import rows
from warmkv_server.kv.core import Core
from warmkv_server.kv.index import Node
from warmkv_server.kv.types import Fallback, PartKind

log = logging.getLogger(__name__)


class Collector:
    """At most one collection runs at a time."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._suspects: dict[Node, None] = {}
        self._removing: set[bytes] = set()
        self._running: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()

    def suspect(self, nodes: Iterable[Node]) -> None:
        """These have lost a reference, a pin, or the need for their window: look at them soon."""
        for node in nodes:
            if not node.pins and (not node.refs or self._spare_window(node)):
                self._suspects[node] = None
        if self._suspects and self._running is None:
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
        paths = [core.path(node, kind) for node, parts in dropped.items() for kind in parts]
        ids = {node.id for node in dropped}
        self._removing |= ids
        before = {node: node.lost for node in dropped}
        for node in dropped:
            node.parts, node.lost = {}, reason
        try:
            await core.journal.remove([rows.update_node(node) for node in dropped if node.saved])
        except OSError:
            for node, parts in dropped.items():
                node.parts, node.lost = parts, before[node]
            raise
        else:
            core.block_bytes -= sum(part.nbytes for parts in dropped.values() for part in parts.values())
            await before_unlinking()
            await core.writing(_unlink_all, core, paths)
        finally:
            self._removing -= ids
            self._idle.set()

    def removing(self, nodes: Iterable[Node]) -> bool:
        """Whether files under one of these ids are being removed just now."""
        return any(node.id in self._removing for node in nodes)

    async def idle(self) -> None:
        """Wait until nothing is being removed."""
        while self._running is not None or self._removing:
            self._idle.clear()
            await self._idle.wait()

    async def _run(self) -> None:
        try:
            while self._suspects:
                suspects, self._suspects = list(self._suspects), {}
                gone = [node for node in suspects if not node.refs and not node.pins]
                slimmer = [node for node in suspects if node.refs and not node.pins and self._spare_window(node)]
                if (gone or slimmer) and not await self._remove(gone, slimmer):
                    return  # The disk refuses. What is left is looked at again at the next start.
        finally:
            self._running = None
            self._idle.set()

    @staticmethod
    def _spare_window(node: Node) -> bool:
        return PartKind.WINDOW in node.parts and not node.window_refs

    async def _remove(self, gone: list[Node], slimmer: list[Node]) -> bool:
        """Remove nodes, and the windows of others. False if the disk refuses; all is as before then."""
        core = self._core
        paths = [core.path(node, kind) for node in gone for kind in node.parts]
        paths += [core.path(node, PartKind.WINDOW) for node in slimmer]
        windows = {node: node.parts.pop(PartKind.WINDOW) for node in slimmer}
        dirty = [node for node in slimmer if node.saved and node.dirty]
        for node in dirty:
            node.dirty = False  # Now, not afterwards, as in a commit.
        for node in gone:
            del core.index.nodes[node.id]
        ids = {node.id for node in (*gone, *slimmer)}
        self._removing |= ids
        try:
            try:
                statements = [rows.delete_node(node) for node in gone if node.saved]
                statements += [rows.update_node(node) for node in slimmer if node.saved]
                if statements:
                    await core.journal.remove(statements)
            except Exception as error:
                _say("the index refuses to forget blocks that nobody needs", error)
                core.index.nodes.update((node.id, node) for node in gone)
                for node, part in windows.items():
                    node.parts[PartKind.WINDOW] = part
                for node in dirty:
                    node.dirty = True
                return False
            for node in gone:
                core.hot.drop(node, unsaved_too=True)
            for node in windows:
                core.hot.drop(node, PartKind.WINDOW)
            core.block_bytes -= sum(node.disk_bytes for node in gone)
            core.block_bytes -= sum(part.nbytes for part in windows.values())
            try:
                await core.writing(_unlink_all, core, paths)
            except Exception as error:
                _say("the disk refuses to remove files that nobody needs", error)
                return False
            return True
        finally:
            self._removing -= ids


def _say(what: str, error: Exception) -> None:
    log.warning(
        "%s; the next start of a server goes on with it: %s", what, error, exc_info=not isinstance(error, OSError)
    )


def _unlink_all(core: Core, paths: list[Path]) -> None:
    for path in paths:
        core.files.unlink(path)
