"""The hot tier: parts of nodes in RAM, by bytes, least recently used first to go.

Everything here is on disk too (written through at commit), so eviction only drops memory. What the disk refused is
marked unsaved and stays until it is written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from warmkv_server.kv.index import Node
from warmkv_server.kv.types import PartKind, Tensors

PartKey = tuple[bytes, PartKind]
"""(node id, kind)"""


@dataclass(slots=True)
class HotPart:
    node: Node
    kind: PartKind
    tensors: Tensors
    nbytes: int
    unsaved: bool


class HotTier:
    """
    Args:
        limit: bytes. Unsaved and pinned parts may exceed it.
        may_evict: whether automatic eviction may take a node's parts (agents can be pinned).
    """

    def __init__(self, limit: int, may_evict: Callable[[Node], bool]) -> None:
        self.limit = limit
        self.nbytes = 0
        self.unsaved_bytes = 0
        self._may_evict = may_evict
        self._parts: OrderedDict[PartKey, HotPart] = OrderedDict()

    def get(self, node: Node, kind: PartKind) -> Tensors | None:
        part = self._parts.get((node.id, kind))
        return None if part is None else part.tensors

    def has(self, node: Node, kind: PartKind) -> bool:
        return (node.id, kind) in self._parts

    def put(self, node: Node, kind: PartKind, tensors: Tensors, *, unsaved: bool = False) -> None:
        """Keep a part. What is there already stays: the first copy of a node is the one that everybody uses.

        Args:
            unsaved: there is no file of it, perhaps not any more.
        """
        part = self._parts.get((node.id, kind))
        if part is None:
            nbytes = sum(int(array.nbytes) for array in tensors.values())
            part = self._parts[node.id, kind] = HotPart(node, kind, tensors, nbytes, unsaved=False)
            self.nbytes += nbytes
        if unsaved and not part.unsaved:
            part.unsaved = True
            self.unsaved_bytes += part.nbytes
        self._parts.move_to_end((node.id, kind))

    def saved(self, node: Node, kind: PartKind) -> None:
        """The disk has it now."""
        part = self._parts.get((node.id, kind))
        if part is not None and part.unsaved:
            part.unsaved = False
            self.unsaved_bytes -= part.nbytes

    def touch(self, node: Node) -> None:
        """Move to the end of the queue. Touch a context from its end to its start: the end is evicted first."""
        for kind in PartKind:
            if (node.id, kind) in self._parts:
                self._parts.move_to_end((node.id, kind))

    def bytes_of(self, node: Node) -> int:
        return sum(part.nbytes for kind in PartKind if (part := self._parts.get((node.id, kind))))

    def drop(self, node: Node, kind: PartKind | None = None, *, unsaved_too: bool = False) -> int:
        """Let go of one kind, or of all; returns the bytes. Unsaved parts stay unless the node itself is going."""
        freed = 0
        for each in PartKind if kind is None else (kind,):
            part = self._parts.get((node.id, each))
            if part is not None and (unsaved_too or not part.unsaved):
                del self._parts[node.id, each]
                self.nbytes -= part.nbytes
                self.unsaved_bytes -= part.nbytes * part.unsaved
                freed += part.nbytes
        return freed

    def shrink(self, limit: int | None = None) -> list[Node]:
        """Evict down to the limit, or to another one this once; returns the nodes that lost a part."""
        victims: list[HotPart] = []
        excess = self.nbytes - (self.limit if limit is None else limit)
        for part in self._parts.values():
            if excess <= 0:
                break
            if not part.unsaved and self._may_evict(part.node):
                victims.append(part)
                excess -= part.nbytes
        for part in victims:
            self.drop(part.node, part.kind)
        return [part.node for part in victims]
