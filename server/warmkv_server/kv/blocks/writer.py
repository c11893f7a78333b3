"""Copying KV from what a request holds in RAM into arrays of new nodes, and writing those as objects. Blocking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from warmkv_server.contract.kv import Growth, PartKind, Reuse, Tensors, TensorSpec, policy_of
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.blocks.arrays import allocate, view
from warmkv_server.kv.blocks.blockfile import BlockInfo, Part
from warmkv_server.kv.blocks.names import object_name
from warmkv_server.kv.blocks.tier import BlockTier


@dataclass(frozen=True)
class RequestKV:
    """The KV of one context as a request holds it: what was loaded, and what was computed behind it."""

    reuse: Reuse
    growth: Growth | None

    def copy(self, kind: PartKind, start: int, end: int, specs: Sequence[TensorSpec]) -> dict[str, mx.array]:
        """New arrays of the tokens [start, end), or of the snapshot taken after `end` tokens."""
        made = allocate(specs, end - start)
        for spec in specs:
            target = view(made[spec.name])
            if policy_of(kind).snapshot:
                target[...] = view(self._snapshot(kind, end)[spec.name])
                continue
            done = start
            for first, last, tensors in self._pieces(kind):
                low, high = max(first, done), min(last, end)
                if low == done and low < high:
                    source = view(tensors[spec.name])
                    target[:, :, low - start : high - start] = source[:, :, low - first : high - first]
                    done = high
            if done != end:
                raise LookupError(f"no {kind} words of tokens {done} to {end}")
        return made

    def _pieces(self, kind: PartKind) -> Iterator[tuple[int, int, Tensors]]:
        for span in self.reuse.spans:
            if kind in span.parts:
                yield span.start, min(span.end, self.reuse.length), span.parts[kind]
        if self.growth is not None and kind in self.growth.tensors:
            yield self.growth.start, self.growth.end, self.growth.tensors[kind]

    def _snapshot(self, kind: PartKind, length: int) -> Tensors:
        if self.growth is not None and length in self.growth.snapshots:
            return self.growth.snapshots[length]
        last = self.reuse.spans[-1]
        if last.end != length:
            raise LookupError(f"no snapshot after {length} tokens")
        return last.parts[kind]


def write_part(tier: BlockTier, info: BlockInfo, specs: Sequence[TensorSpec], tensors: Tensors) -> Part:
    """Have one object in a tier. It is durable when the tier has been told to sync it.

    Raises:
        OSError: the tier refused.
    """
    payload = [blockfile.flat(view(tensors[spec.name])) for spec in specs]
    head = blockfile.header(info, specs)
    digest = blockfile.put_checksum(head, payload)
    return Part(tier.put(object_name(info.node, info.kind, digest), [memoryview(head), *payload]), digest)
