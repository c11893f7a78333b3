"""Write-through: the objects of new nodes into the tier, and their arrays into RAM."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from warmkv_server.contract.kv import PartKind, Tensors
from warmkv_server.contract.names import AgentKey, is_hidden
from warmkv_server.kv.blocks.blockfile import BadFile, header_bytes, payload_size
from warmkv_server.kv.blocks.writer import RequestKV, write_part
from warmkv_server.kv.index.hot import PartKey
from warmkv_server.kv.index.index import Node, PartOf
from warmkv_server.kv.tasks.core import Core
from warmkv_server.kv.tasks.loader import Loader
from warmkv_server.kv.tasks.quota import Quota, Room


@dataclass
class WriteResult:
    """The result of a commit's writing, so far.

    Attributes:
        names: of objects that are to be synced.
        refusal: the disk's, once it has refused; nothing more is tried then.
        room: what the files may take of the quota.
    """

    names: set[str] = field(default_factory=set)
    bytes_written: int = 0
    refusal: OSError | None = None
    room: Room | None = None


class PartWriter:
    """Used on the event loop's thread. Each part is made once, whoever else makes the same at that moment."""

    def __init__(self, core: Core, loader: Loader, quota: Quota) -> None:
        self._core = core
        self._loader = loader
        self._quota = quota
        self._making: dict[PartKey, asyncio.Future[None]] = {}
        self._large: set[asyncio.Task[None]] = set()
        """Files in work of commits that have many."""

    async def write(self, key: AgentKey, parts: Iterable[tuple[Node, PartKind]], kv: RequestKV) -> WriteResult:
        """Make every part exist on disk and in RAM; where the disk refuses, in RAM alone."""
        parts = list(parts)
        result = WriteResult(self._perhaps_not_synced(parts))
        wanted = [(node, kind) for node, kind in parts if self._is_wanted(node, kind, kv.reuse.length)]
        async with self._room(key, wanted, result):
            await self._write_all(wanted, kv, result)
            await self._sync(result)
        return result

    async def _write_all(self, wanted: list[tuple[Node, PartKind]], kv: RequestKV, result: WriteResult) -> None:
        """Several at once. Where somebody decodes, a commit of more than a few goes one by one: what writes competes
        for the interpreter's lock and for processors with whoever computes tokens and sends them. It waits for others
        of its size alone: of small ones there may always be one in work."""
        large = len(wanted) > self._core.tuning.io_threads
        tasks: list[asyncio.Task[None]] = []
        for node, kind in wanted:
            while large and len(self._large) >= self._at_once():
                await asyncio.wait(self._large, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(self._write(node, kind, kv, result))
            if large:
                self._large.add(task)
                task.add_done_callback(self._large.discard)
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks)  # All of them, also when one fails: the nodes are theirs until then.
            await asyncio.gather(*tasks)

    def _at_once(self) -> int:
        """Large commits' files in work before one begins with another; enough for all threads where nobody decodes."""
        return 1 if self._core.files.busy() else 2 * self._core.tuning.io_threads

    async def write_unsaved(self, key: AgentKey, parts: Iterable[tuple[Node, PartKind]]) -> WriteResult:
        """Try once more what the disk has refused."""
        parts = list(parts)
        result = WriteResult(self._perhaps_not_synced(parts))
        hot = self._core.hot
        wanted = [(node, kind) for node, kind in parts if kind not in node.parts and hot.has(node, kind)]
        async with self._room(key, wanted, result):
            for node, kind in wanted:
                async with self._alone(node, kind):
                    tensors = hot.get(node, kind)
                    if tensors is not None and kind not in node.parts:
                        await self._save(node, kind, tensors, result)
            await self._sync(result)
        return result

    def _perhaps_not_synced(self, parts: Iterable[PartOf]) -> set[str]:
        """Objects that no transaction counts on yet: whoever made them may still be about to sync their names,
        or was refused before."""
        known = ((node, kind) for node, kind in parts if kind in node.parts and (node.dirty or not node.saved))
        return {node.object_name(kind, node.parts[kind]) for node, kind in known}

    @contextlib.asynccontextmanager
    async def _room(
        self, key: AgentKey, parts: list[tuple[Node, PartKind]], result: WriteResult
    ) -> AsyncIterator[None]:
        """Room in the quota for files that don't exist yet; without it, nothing is written."""
        new = [(node, kind) for node, kind in parts if kind not in node.parts]
        size = sum(
            payload_size(self._core.specs[kind], node.count) + header_bytes(node.block_tokens) for node, kind in new
        )
        async with contextlib.AsyncExitStack() as stack:
            try:
                result.room = await stack.enter_async_context(
                    self._quota.room(key.tenant, size, hidden=is_hidden(key.agent_id))
                )
            except OSError as error:
                result.refusal = error
            yield

    def _is_wanted(self, node: Node, kind: PartKind, reused: int) -> bool:
        """What has no file needs one. What others have made meanwhile is taken into RAM, as what was made here is; what
        was reused was in RAM a moment ago, and need not come back."""
        if kind not in node.parts:
            return True
        return node.end > reused and bool(self._core.specs[kind]) and not self._core.hot.has(node, kind)

    async def _write(self, node: Node, kind: PartKind, kv: RequestKV, result: WriteResult) -> None:
        core = self._core
        async with self._alone(node, kind):
            await self._loader.put_away(node, kind)
            if kind in node.parts:
                # Somebody was first with this context: their bytes are the ones to go on with.
                result.names.add(node.object_name(kind, node.parts[kind]))
                if not core.specs[kind] or core.hot.has(node, kind) or await self._readable(node, kind):
                    return
            tensors = core.hot.get(node, kind)
            if tensors is None:
                tensors = await core.writing(kv.copy, kind, node.start, node.end, core.specs[kind])
            core.hot.put(node, kind, tensors, unsaved=True)
            await self._save(node, kind, tensors, result)

    @contextlib.asynccontextmanager
    async def _alone(self, node: Node, kind: PartKind) -> AsyncIterator[None]:
        """Nobody else makes this part during the block."""
        key = node.id, kind
        while (other := self._making.get(key)) is not None:
            await asyncio.shield(other)
        making = self._making[key] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._making[key]
            making.set_result(None)

    async def _readable(self, node: Node, kind: PartKind) -> bool:
        """Take the stored bytes into RAM."""
        try:
            await asyncio.shield(self._loader.read(node, kind))
        except BadFile:
            return False
        except OSError:
            return True  # Not now, but nothing says that the file is bad.
        return True

    async def _save(self, node: Node, kind: PartKind, tensors: Tensors, result: WriteResult) -> None:
        core = self._core
        if result.refusal is not None:
            return
        try:
            part = await core.writing(write_part, core.tier, core.info(node, kind), core.specs[kind], tensors)
        except OSError as error:
            result.refusal = error
            return
        name = node.object_name(kind, part)
        core.accounts.gone([name])  # It may have lain there: what the disk had refused to remove.
        core.accounts.wrote(node, kind, part)
        node.lost, node.dirty = None, True
        if result.room is not None:
            result.room.spend(part.nbytes)
        core.counters.kv_bytes_written += part.nbytes
        core.hot.saved(node, kind)
        result.names.add(name)
        result.bytes_written += part.nbytes

    async def _sync(self, result: WriteResult) -> None:
        if result.refusal is None and result.names:
            try:
                await self._core.writing(self._core.tier.sync, sorted(result.names))
            except OSError as error:
                result.refusal = error
