"""Bringing KV into RAM for a request: reading, verifying, and making the best of what can't be read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from warmkv_server.contract.kv import Fallback, PartKind, Reuse, Span, Tensors
from warmkv_server.kv.blocks.blockfile import BadFile, Part
from warmkv_server.kv.blocks.reader import PartOrder, read_parts
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.index.hot import PartKey
from warmkv_server.kv.index.index import Node
from warmkv_server.kv.index.prefix import Has, Lease, Under, longest_usable, needed
from warmkv_server.kv.tasks.core import BATCH_BYTES, Core
from warmkv_server.kv.tasks.manifests import Manifests

log = logging.getLogger(__name__)

BATCH_FILES = 32
"""So many at most: a batch's files are open at the same time."""
REST_SECONDS = 30.0
"""Without a read, after which memory kept for the next is let go of."""


@dataclass(eq=False, slots=True)
class _Read:
    """A part on its way from its file.

    Attributes:
        part: the file as it was when it was asked for; None if there was none.
    """

    node: Node
    kind: PartKind
    part: Part | None
    future: asyncio.Future[Tensors]


class Loader:
    def __init__(self, core: Core, manifests: Manifests) -> None:
        self._core = core
        self._manifests = manifests
        self._reads: dict[tuple[Node, PartKind], asyncio.Future[Tensors]] = {}
        self._losing: list[PartKey] = []
        self._quarantine = asyncio.Lock()
        self._batches: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None

    async def load(self, lease: Lease) -> Reuse:
        """See `Store.load`."""
        began = time.perf_counter()
        deadline = began + self._core.settings.load_seconds
        held: dict[PartKey, Tensors] = {}
        read: dict[PartKey, int] = {}
        while lease.length:
            wanted = self._parts(lease)
            bad = await self._gather(wanted, held, read, deadline)
            if bad is None:
                break
            node, lease.fallback = bad
            self._shorten(lease, node, held, late=time.perf_counter() >= deadline)
        for node in reversed(lease.nodes):
            self._core.hot.touch(node)
        return self._reuse(lease, held, read, time.perf_counter() - began)

    def read(self, node: Node, kind: PartKind) -> asyncio.Future[Tensors]:
        """One part into the hot tier. Whoever wants it meanwhile gets the same future: wait for it, don't cancel it.

        It raises BadFile if the file can't be used (if it was damaged, it is in quarantine then), and OSError if it
        can't be read now.
        """
        return self._read_all([(node, kind)])[0]

    def _read_all(self, wanted: Sequence[tuple[Node, PartKind]]) -> list[asyncio.Future[Tensors]]:
        """`read` for many: small files share a trip to a thread, which costs more than reading one of them."""
        new: list[_Read] = []
        for node, kind in wanted:
            key = node, kind  # The node itself: another with its id may have come while a slow disk was asked.
            if key not in self._reads:
                future = self._reads[key] = asyncio.get_running_loop().create_future()
                future.add_done_callback(partial(self._done, key))
                new.append(_Read(node, kind, node.parts.get(kind), future))
        for batch in _batches(new, self._core.tuning.io_threads):
            task = asyncio.create_task(self._read_batch(batch))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)
        return [self._reads[key] for key in wanted]

    async def put_away(self, node: Node, kind: PartKind) -> None:
        """Wait until bad objects of this part, if there were any, are out of the way: computed anew, it may have the
        bytes that they should have had, and so the same name. Whoever loses it may do so for a node of this id that is
        not in the index any more."""
        while (node.id, kind) in self._losing:
            async with self._quarantine:
                pass

    async def idle(self) -> None:
        """Wait for reads that nobody waits for any more."""
        await asyncio.gather(*self._batches, return_exceptions=True)

    def _rest_later(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        self._rest = asyncio.get_running_loop().call_later(REST_SECONDS, self._core.spare.rest)

    def _done(self, key: tuple[Node, PartKind], future: asyncio.Future[Tensors]) -> None:
        del self._reads[key]
        if not future.cancelled():
            future.exception()  # Seen: whoever waits for it gets it.

    def _parts(self, lease: Lease) -> list[tuple[Node, PartKind]]:
        layout = self._core.layout
        parts = [
            (node, policy.kind)
            for policy in layout.policies
            if not policy.snapshot
            for node in needed(policy, layout, lease.nodes, lease.length)
        ]
        if lease.snapshot is not None:
            parts += [(lease.snapshot, kind) for kind in layout.snapshots]
        return parts

    async def _gather(
        self,
        wanted: Iterable[tuple[Node, PartKind]],
        held: dict[PartKey, Tensors],
        read: dict[PartKey, int],
        deadline: float,
    ) -> tuple[Node, Fallback] | None:
        """Fill `held` with the wanted parts. Returns the first node whose part can't be had in time, and why."""
        missing: list[tuple[Node, PartKind]] = []
        for node, kind in wanted:
            key = node.id, kind
            if key in held:
                continue
            tensors = self._core.hot.get(node, kind)
            if tensors is not None:
                held[key] = tensors
            else:
                missing.append((node, kind))
        if not missing:
            return None
        reads = dict(zip(self._read_all(missing), missing, strict=True))
        _, late = await asyncio.wait(reads, timeout=max(deadline - time.perf_counter(), 0))
        failed: list[tuple[Node, Fallback]] = []
        for task, (node, kind) in reads.items():
            if task in late:
                failed.append((node, Fallback.LOAD_TIMEOUT))
                continue
            try:
                held[node.id, kind] = task.result()
            except BadFile as bad:
                failed.append((node, bad.reason))
            except OSError as error:
                log.warning("block %s can't be read: %s", node.id.hex(), error)
                failed.append((node, Fallback.MISSING_BLOCK))
            else:
                part = node.parts.get(kind)
                read[node.id, kind] = part.nbytes if part is not None else 0
        return min(failed, key=lambda f: f[0].start, default=None)

    def _shorten(self, lease: Lease, bad: Node, held: dict[PartKey, Tensors], *, late: bool) -> None:
        """Go back to the longest usable prefix before a bad node; when time is up, to one that is in RAM already."""
        core, everywhere = self._core, self._core.layout.everywhere

        def at_hand(node: Node, kind: PartKind) -> bool:
            return (node.id, kind) in held or core.hot.has(node, kind)

        has: Has = at_hand if late else core.has
        nodes = [n for n in lease.nodes if all(has(n, kind) for kind in everywhere)] if late else lease.nodes
        nodes = nodes[: _contiguous(nodes)]
        reach = min(bad.start, nodes[-1].end if nodes else 0) if not bad.snapshot else bad.end - 1
        reach = min(reach, nodes[-1].end if nodes else 0)
        nodes = [node for node in nodes if node.start < reach]
        best = longest_usable(
            core.index, core.layout, nodes, reach, Under(core.root(lease.tenant), lease.extra_key), has
        )
        lease.length, lease.nodes, lease.snapshot = best.length, list(best.nodes), best.snapshot
        lease.own_nodes = min(lease.own_nodes, len(lease.nodes))
        if best.snapshot is not None:
            lease.pin(best.snapshot)

    async def _read_batch(self, batch: list[_Read]) -> None:
        core = self._core
        orders = {
            read: PartOrder(
                core.info(read.node, read.kind),
                core.specs[read.kind],
                read.part.digest,
            )
            for read in batch
            if read.part is not None
        }
        try:
            outcomes = dict(
                zip(orders, await core.reading(read_parts, core.tier, [*orders.values()], core.spare), strict=True)
            )
            for read in batch:
                gone = BadFile(read.node.lost or Fallback.MISSING_BLOCK, "gone")
                outcome = outcomes.get(read, gone)
                if isinstance(outcome, BadFile) and self._is_there(read):
                    await self._lose(read.node, read.kind, outcome)
                if isinstance(outcome, Exception):
                    read.future.set_exception(outcome)
                else:
                    read.future.set_result(self._keep(read, outcome))
            core.hot.shrink()
        except Exception as error:
            for read in batch:
                if not read.future.done():
                    read.future.set_exception(error)
        finally:
            for read in batch:
                read.future.cancel()  # What isn't done by now never will be.
            self._rest_later()

    def _is_there(self, read: _Read) -> bool:
        """Whether the store still has what was read: slow disks answer when the agent may have been deleted, and its
        blocks been made anew by another."""
        node = read.node
        known = self._core.index.nodes.get(node.id) is node
        return known and read.part is not None and node.parts.get(read.kind) is read.part

    def _keep(self, read: _Read, tensors: Tensors) -> Tensors:
        core, node, kind = self._core, read.node, read.kind
        core.counters.bytes_loaded += read.part.nbytes if read.part is not None else 0
        without_file = core.index.nodes.get(node.id) is node and kind not in node.parts  # the quota took it meanwhile
        if not self._is_there(read) and not without_file:
            return tensors
        core.hot.put(node, kind, tensors)
        return core.hot.get(node, kind) or tensors

    async def _lose(self, node: Node, kind: PartKind, bad: BadFile) -> None:
        """Take note that a file can't be used, and put it away."""
        core = self._core
        log.warning("block %s (%s) can't be used: %s", node.id.hex(), kind, bad)
        part = core.accounts.lost(node, kind)
        missing = bad.reason is Fallback.MISSING_BLOCK
        node.lost = Fallback.MISSING_BLOCK if missing else Fallback.QUARANTINED
        if not node.parts:
            self._manifests.note_lost([node])
        try:
            if not missing:
                await self._put_away(node, kind, part, bad.version)
            if node.saved:
                await core.journal.apply([rows.update_node(node)])
        except OSError as error:
            node.dirty = True
            log.warning("block %s can't be put into quarantine: %s", node.id.hex(), error)

    async def _put_away(self, node: Node, kind: PartKind, part: Part, version: object) -> None:
        """One at a time: each counts what the folder holds afterwards."""
        core = self._core
        name = node.object_name(kind, part)
        core.counters.quarantined += 1
        core.accounts.go({name: part.nbytes})
        self._losing.append((node.id, kind))
        try:
            async with self._quarantine:
                core.quarantine_bytes = await core.writing(core.tier.set_aside, name, version)
            core.accounts.gone([name])
        finally:
            self._losing.remove((node.id, kind))

    def _reuse(self, lease: Lease, held: dict[PartKey, Tensors], read: dict[PartKey, int], seconds: float) -> Reuse:
        core = self._core
        layout = core.layout
        kinds: defaultdict[Node, list[PartKind]] = defaultdict(list)
        for node, kind in self._parts(lease):
            kinds[node].append(kind)
        spans = []
        hot = warm = shared = 0
        snapshot_read = lease.snapshot is not None and any((lease.snapshot.id, k) in read for k in layout.snapshots)
        last = len(lease.nodes) - 1
        for number, node in enumerate(lease.nodes):
            parts = {kind: held[node.id, kind] for kind in kinds[node]}
            spans.append(Span(node.start, node.count, parts))
            tokens = min(node.end, lease.length) - node.start
            if number >= lease.own_nodes:
                shared += tokens
            elif any((node.id, kind) in read for kind in parts) or (snapshot_read and (number == last or not parts)):
                warm += tokens
            else:
                hot += tokens
        if lease.snapshot is not None:
            spans.append(Span(lease.length, 0, {kind: held[lease.snapshot.id, kind] for kind in layout.snapshots}))
        return Reuse(
            length=lease.length,
            spans=tuple(spans),
            hot_tokens=hot,
            warm_tokens=warm,
            shared_tokens=shared,
            bytes_loaded=sum(read.values()),
            fallback=lease.fallback,
            seconds=seconds,
        )


def _contiguous(nodes: list[Node]) -> int:
    """How many of the nodes, from the first, follow each other without a gap."""
    end = 0
    for number, node in enumerate(nodes):
        if node.start != end:
            return number
        end = node.end
    return len(nodes)


def _batches(reads: Sequence[_Read], threads: int) -> Iterator[list[_Read]]:
    """Cut into batches: no fewer than there are threads, where there is work for them; none of many bytes or files."""
    most = min(-(-len(reads) // threads), BATCH_FILES)
    batch: list[_Read] = []
    nbytes = 0
    for read in reads:
        batch.append(read)
        nbytes += read.part.nbytes if read.part is not None else 0
        if nbytes >= BATCH_BYTES or len(batch) >= most:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
