"""The hot tier: parts of nodes in RAM, within a budget of bytes; LRU eviction, tenants sharing what there is.

Everything here is on disk too (written through at commit), so eviction only drops memory. What the disk refused is
marked unsaved and stays until it is written.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from warmkv_server.contract.kv import PartKind, Tensors, all_kinds
from warmkv_server.kv.index.index import Node

PartKey = tuple[bytes, PartKind]
"""(node id, kind)"""


@dataclass(slots=True)
class HotPart:
    node: Node
    kind: PartKind
    tensors: Tensors
    nbytes: int
    unsaved: bool


@dataclass(eq=False, slots=True)
class _Line:
    """A tenant's parts, least recently used first."""

    parts: OrderedDict[PartKey, HotPart] = field(default_factory=OrderedDict)
    nbytes: int = 0
    unsaved_bytes: int = 0


class HotTier:
    """
    Args:
        limit: bytes. Nothing but unsaved parts may exceed it, and those only until whoever adds them has looked.

    Attributes:
        hidden_bytes: of parts that hidden agents alone have; `Accounts` keeps it.
        entered, left: are told of each part that comes and goes: its node, its kind, its bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.unsaved_bytes = 0
        self.hidden_bytes = 0
        self.entered: Callable[[Node, PartKind, int], None] = _nobody
        self.left: Callable[[Node, PartKind, int], None] = _nobody
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)

    def get(self, node: Node, kind: PartKind) -> Tensors | None:
        part = self._lines[node.tenant].parts.get((node.id, kind))
        return None if part is None else part.tensors

    def has(self, node: Node, kind: PartKind) -> bool:
        return (node.id, kind) in self._lines[node.tenant].parts

    def unsaved_of(self, tenant: str) -> int:
        """Bytes of a tenant that no disk has."""
        return self._lines[tenant].unsaved_bytes

    def put(self, node: Node, kind: PartKind, tensors: Tensors, *, unsaved: bool = False) -> None:
        """Keep a part. What is there already stays: the first copy of a node is the one that everybody uses.

        Args:
            unsaved: there is no file of it, perhaps not any more.
        """
        line = self._lines[node.tenant]
        part = line.parts.get((node.id, kind))
        if part is None:
            nbytes = sum(int(array.nbytes) for array in tensors.values())
            part = line.parts[node.id, kind] = HotPart(node, kind, tensors, nbytes, unsaved=False)
            line.nbytes += nbytes
            self.nbytes += nbytes
            self.entered(node, kind, nbytes)
        if unsaved and not part.unsaved:
            part.unsaved = True
            line.unsaved_bytes += part.nbytes
            self.unsaved_bytes += part.nbytes
        line.parts.move_to_end((node.id, kind))

    def saved(self, node: Node, kind: PartKind) -> None:
        """The disk has it now."""
        line = self._lines[node.tenant]
        part = line.parts.get((node.id, kind))
        if part is not None and part.unsaved:
            part.unsaved = False
            line.unsaved_bytes -= part.nbytes
            self.unsaved_bytes -= part.nbytes

    def touch(self, node: Node) -> None:
        """Move to the end of the queue. Touch a context from its end to its start: the end is evicted first."""
        parts = self._lines[node.tenant].parts
        for kind in all_kinds():
            if (node.id, kind) in parts:
                parts.move_to_end((node.id, kind))

    def drop(self, node: Node, kind: PartKind | None = None, *, unsaved_too: bool = False) -> int:
        """Let go of one kind, or of all; returns the bytes. Unsaved parts stay unless the node itself is going."""
        line = self._lines[node.tenant]
        freed = 0
        for each in all_kinds() if kind is None else (kind,):
            part = line.parts.get((node.id, each))
            if part is not None and (unsaved_too or not part.unsaved):
                del line.parts[node.id, each]
                line.nbytes -= part.nbytes
                line.unsaved_bytes -= part.nbytes * part.unsaved
                self.nbytes -= part.nbytes
                self.unsaved_bytes -= part.nbytes * part.unsaved
                self.left(node, each, part.nbytes)
                freed += part.nbytes
        return freed

    def shrink(self, limit: int | None = None, *, pinned_too: bool = True) -> None:
        """Evict down to the limit, or to another one this once.

        What goes is of the tenants that have more than their equal share, of the one with the most first. What hidden
        agents alone have goes before anything else, whoever's it is. Pinned agents go when nothing else does: a pin
        promises the copy on disk, and RAM only as far as it reaches.
        """
        limit = self.limit if limit is None else limit
        share = limit // max(sum(line.nbytes > 0 for line in self._lines.values()), 1)
        for floor in (share, 0):
            if self.nbytes > limit and self.hidden_bytes:
                self._evict(limit, floor, _is_hidden)
        # Whoever has no more than its share loses something only where all that the others have is unsaved.
        for floor in (share, 0):
            for chosen in (_is_free, _is_pinned) if pinned_too else (_is_free,):
                if self.nbytes > limit:
                    self._evict(limit, floor, chosen)

    def _evict(self, limit: int, floor: int, chosen: Callable[[Node], bool]) -> None:
        """Evict down to the limit, of tenants that have more than `floor` bytes, what is chosen."""
        excess = self.nbytes - limit
        victims: list[HotPart] = []
        tenants = [
            (-line.nbytes, number, _evictable(line, chosen))
            for number, line in enumerate(self._lines.values())
            if line.nbytes > floor
        ]
        heapify(tenants)
        while excess > 0 and tenants and -tenants[0][0] > floor:
            held, number, parts = heappop(tenants)
            part = next(parts, None)
            if part is not None:
                victims.append(part)
                excess -= part.nbytes
                heappush(tenants, (held + part.nbytes, number, parts))
        for part in victims:
            self.drop(part.node, part.kind)


def _evictable(line: _Line, chosen: Callable[[Node], bool]) -> Iterator[HotPart]:
    return (part for part in line.parts.values() if not part.unsaved and chosen(part.node))


def _is_hidden(node: Node) -> bool:
    return node.hidden


def _is_free(node: Node) -> bool:
    return not node.pinned_refs


def _is_pinned(node: Node) -> bool:
    return bool(node.pinned_refs)


def _nobody(node: Node, kind: PartKind, nbytes: int) -> None:
    """Is told."""
