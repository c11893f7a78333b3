"""Keeping the agents' manifests behind their commits, and the moment when one may be removed.

The index is the commit point, and the log of commits has what its loss would cost, so nobody waits for a manifest: it
is written after the commit, at most once in a while for each agent, many of them with one sync of their folder. What a
manifest on disk refers to stays there until a newer one is: nodes that a commit has replaced, and those of
which it doesn't need a part any more, are pinned for as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from warmkv_server.contract.kv import policy_of
from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog.manifest import Manifest, encode
from warmkv_server.kv.catalog.manifest_files import write
from warmkv_server.kv.index.index import Agent, Node
from warmkv_server.kv.tasks.core import Core

log = logging.getLogger(__name__)

_BATCH = 16
"""Manifests written with one sync of the folder. A deletion waits for a batch at most."""


@dataclass
class _Owed:
    """A manifest that is to be written, and the pinned nodes that the one on disk may still refer to.

    Attributes:
        number: of the note.
        durable: of the last transaction that it surely is not older than.
    """

    number: int
    durable: int
    content: bytes
    held: list[Node]


class Manifests:
    """Used on the event loop's thread."""

    def __init__(self, core: Core, release: Callable[[Iterable[Node]], None]) -> None:
        """
        Args:
            release: is told of nodes that no manifest on disk refers to any more.
        """
        self._core = core
        self._release = release
        self._noted = 0
        self._owed: dict[AgentKey, _Owed] = {}
        self._batch: dict[AgentKey, _Owed] = {}
        self._batch_over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @property
    def refused(self) -> bool:
        """Whether the disk has refused manifests that are still to be written."""
        return bool(self._owed) and self._task is None

    def note(self, agent: Agent, replaced: Iterable[Node] = ()) -> None:
        """The journal has the agent as it is now: its manifest is to say so, soon.

        Args:
            replaced: nodes that it referenced before.
        """
        core = self._core
        known = agent.saved and agent.durable and core.index.agents.get(agent.key) is agent
        if agent.deleting or not known:
            return
        now = set(agent.all_nodes())
        held = [n for n in set(replaced) if n not in now or _has_more(n, agent)]
        for node in held:
            node.pins += 1
        durable = core.journal.durable
        content = encode(Manifest.of(agent, durable))
        core.manifest_bytes += len(content)
        owed = self._owed.get(agent.key)
        if owed is None:
            self._noted += 1
            self._owed[agent.key] = _Owed(self._noted, durable, content, held)
        else:
            core.manifest_bytes -= len(owed.content)
            owed.content, owed.durable = content, durable
            owed.held += held
        self._start()

    def note_lost(self, nodes: Iterable[Node]) -> None:
        """These have no files any more: the manifests that refer to them are to have their tokens."""
        lost = set(nodes)
        for agent in self._core.index.agents.values():
            if not lost.isdisjoint(agent.nodes):
                self.note(agent)

    async def remove(self, agent: Agent) -> None:
        """Durably, before the agent itself goes: no lost index brings a deleted agent back. `agent.deleting` is set.

        Raises:
            OSError: the disk refuses.
        """
        core = self._core
        while agent.key in self._batch:
            await self._batch_over.wait()
        owed = self._owed.pop(agent.key, None)
        try:
            await core.writing(_remove, core.files, core.manifest_path(agent.key))
        except BaseException:
            if owed is not None:
                self._owed[agent.key] = owed
            raise
        core.manifest_bytes -= core.manifest_sizes.pop(agent.key, 0)
        if owed is not None:
            core.manifest_bytes -= len(owed.content)
            self._let_go(owed.held)

    async def flush(self) -> None:
        """Write what is owed now, unless the disk refuses."""
        self._start()
        last = self._noted
        while self._task is not None and any(o.number <= last for o in (*self._batch.values(), *self._owed.values())):
            self._hurry.set()
            await self._batch_over.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._hurry.set()
            await self._task

    def _start(self) -> None:
        if self._owed and self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._owed:
                keys = list(self._owed)
                for first in range(0, len(keys), _BATCH):
                    await self._write_batch(keys[first : first + _BATCH])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._core.tuning.manifest_seconds):
                        await self._hurry.wait()
                self._hurry.clear()
        except OSError as error:
            log.warning("%d manifests wait for the disk, which refuses: %s", len(self._owed), error)
        except Exception:
            log.exception("writing manifests failed; %d are tried again later", len(self._owed))
        finally:
            self._task = None
            self._end_batch()  # Also where there was none: what was owed may have been removed.

    async def _write_batch(self, keys: Iterable[AgentKey]) -> None:
        core = self._core
        batch = self._batch = {key: self._owed.pop(key) for key in keys if key in self._owed}
        contents = {core.manifest_path(key): owed.content for key, owed in batch.items()}
        try:
            await core.writing(write, core.files, contents)
            await core.journal.cover({key: owed.durable for key, owed in batch.items()})
        except BaseException:
            self._owe_again(batch)
            raise
        finally:
            self._batch = {}
            self._end_batch()
        for key, owed in batch.items():
            core.manifest_bytes -= core.manifest_sizes.get(key, 0)  # The new one was counted when it was noted.
            core.manifest_sizes[key] = len(owed.content)
            core.counters.manifest_bytes_written += len(owed.content)
            self._let_go(owed.held)

    def _end_batch(self) -> None:
        self._batch_over.set()
        self._batch_over.clear()

    def _owe_again(self, batch: Mapping[AgentKey, _Owed]) -> None:
        for key, owed in batch.items():
            newer = self._owed.setdefault(key, owed)
            if newer is not owed:
                newer.held += owed.held
                self._core.manifest_bytes -= len(owed.content)

    def _let_go(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            node.pins -= 1
        self._release(nodes)


def _has_more(node: Node, agent: Agent) -> bool:
    """Whether it has a part that the agent doesn't need any more, and that its manifest on disk may count on."""
    return any(policy_of(kind).partial and (node, kind) not in agent.partial for kind in node.parts)


def _remove(files: Files, path: Path) -> None:
    files.unlink(path)
    files.sync_folders([path.parent])
