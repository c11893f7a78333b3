"""Which codec each of a model's streams gets, where the operator asked for one that depends on the model.

Found out on what the model computes of a text: from most of it the constants are made, and on the rest it is measured
what each codec loses. Where what was asked for loses too much, or no less than a simpler one, there is another one, and
the reason is told.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from warmkv_server.contract.kv_choice import AFFINE, CALIBRATED, EXACT, HADAMARD, CodecName, KvChoice
from warmkv_server.engine.cache.codecs.affine import AffineCodec
from warmkv_server.engine.cache.codecs.codec import KEYS, Codec, CodecPlan, Finding, Stream
from warmkv_server.engine.cache.codecs.packing import EIGHT
from warmkv_server.engine.cache.codecs.rotation import Rotation, UnknownRotationError, signature_of
from warmkv_server.engine.cache.codecs.transform import Floats, TransformCodec
from warmkv_server.engine.model import basis, statistics
from warmkv_server.engine.model.constants import Constants, StreamConstants
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.engine.model.statistics import StreamSample

log = logging.getLogger(__name__)


TOKENS = 640
"""Of the text, at most."""

_FIRSTS = 32
"""Tokens that are tried at position 0."""

_FEWEST = 64
"""Tokens from which something can be learned."""

_PIECE = 32
"""Tokens; every fourth piece of the text is for measuring."""

_MOST_LOST = 0.15
"""Of what tells tokens apart, as a share of its cost-weighted variance, in the worst head."""
_GOOD = 0.05
"""What the finer codec may lose. A stream of which it loses more is kept as it is computed."""
_WORTH = 0.9
"""A change of basis has to lose less than this share of what the simple codec loses."""


def choose(
    runner: ModelRunner, asked: KvChoice, group_size: int, tokens: Sequence[int], start: int | None, positions: int
) -> Constants:
    """Look at a model. On the MLX thread.

    Args:
        tokens: of the text.
        start: the token that texts begin with, where the model has one.
        positions: that will be served.
    """
    if len(tokens) < _FEWEST:
        return Constants({})
    tokens = tokens[:TOKENS]
    firsts = list(dict.fromkeys(tokens[:: max(1, len(tokens) // _FIRSTS)]))[:_FIRSTS]
    if start is not None:
        firsts += [start] * (len(firsts) // 4)
    samples = statistics.sample(runner, tokens, firsts)
    rotations = Rotations(runner.model, positions)
    streams = {}
    for stream, sample in samples.items():
        wanted = asked.keys if stream[1] == KEYS else asked.values
        rotation, reason = None, ""
        if sample.rotated_by:
            try:
                rotation = rotations.of(sample.rotated_by, sample.values.shape[-1])
            except UnknownRotationError as error:
                reason = f"the rotation can't be undone: {error}"
                sample = dataclasses.replace(sample, rotated_by="", queries=None)
        streams[stream] = _Stream(sample, rotation, reason, wanted, group_size).chosen()
    return Constants(streams)


class Rotations:
    """Of a model's modules; equal ones are one."""

    def __init__(self, model: Any, positions: int) -> None:
        self._modules = dict(model.named_modules())
        self._positions = positions
        self._found: dict[bytes, Rotation] = {}

    def of(self, name: str, head_dim: int) -> Rotation:
        """
        Raises:
            UnknownRotationError
        """
        module = self._modules[name]
        signature = signature_of(module, head_dim)
        if signature not in self._found:
            self._found[signature] = Rotation.of(module, head_dim, self._positions)
        return self._found[signature]


def plan_of(found: Constants, model: Any, asked: KvChoice, group_size: int, positions: int) -> CodecPlan:
    """The codecs that were chosen.

    Raises:
        UnknownRotationError: the constants are another model's.
    """
    rotations = Rotations(model, positions)
    named = {
        own.rotated_by: rotations.of(own.rotated_by, own.basis.back.shape[-1])
        for own in found.streams.values()
        if own.rotated_by and own.basis is not None
    }
    return found.plan(asked, named, group_size)


class _Stream:
    """One stream, and the codecs that it can have."""

    def __init__(
        self, sample: StreamSample, rotation: Rotation | None, reason: str, asked: CodecName, group_size: int
    ) -> None:
        self.sample, self.rotation, self.reason, self.asked = sample, rotation, reason, asked
        self.group_size = group_size
        _, tokens, self.dims = sample.values.shape
        pieces = np.arange(tokens) // _PIECE % 4 == 3
        self.learned = dataclasses.replace(sample, values=sample.values[:, ~pieces], positions=np.flatnonzero(~pieces))
        self.measured = pieces
        self.cost = basis.cost(sample, rotation)
        values = basis.still(sample, rotation)
        mean = values[:, ~pieces].mean(axis=1, keepdims=True)
        self.spread = _size(values[:, pieces] - mean, self.cost)
        self.whole = _size(sample.values, np.abs(self.cost))

    def chosen(self) -> StreamConstants:
        if self.asked.kind == EXACT:
            return StreamConstants(self.asked, 0, Finding(0.0))
        best = self._best(self.asked.bits)
        if best.finding.loss <= _MOST_LOST or self.asked.bits == 8:
            return best
        finer = self._best(8)
        lost = f"{self.asked} loses {best.finding.loss:.0%} of what tells tokens apart"
        if finer.finding.loss <= _GOOD:
            return dataclasses.replace(finer, finding=Finding(finer.finding.loss, lost))
        return StreamConstants(CodecName(EXACT, 0), 0, Finding(0.0, lost))

    def _best(self, bits: int) -> StreamConstants:
        best: StreamConstants | None = None
        plain = self._plain(bits)
        for kind in self._kinds():
            best = self._transformed(kind, bits)
            if plain is None or best.finding.loss < _WORTH * plain.finding.loss:
                break
        if best is None and plain is None:
            reason = f"heads of {self.dims} values can't be quantised together"
            return StreamConstants(CodecName(EXACT, 0), 0, Finding(0.0, reason))
        if best is None or (plain is not None and best.finding.loss >= _WORTH * plain.finding.loss):
            assert plain is not None
            best = plain
        if best.codec.kind == self.asked.kind:
            return best
        reason = (
            self.reason or f"{self.asked} loses as much as that, {best.finding.loss:.1%} of what tells tokens apart"
        )
        return dataclasses.replace(best, finding=Finding(best.finding.loss, reason))

    def _kinds(self) -> tuple[str, ...]:
        """Of changes of basis, those that can be had in place of what was asked for."""
        if self.asked.kind == AFFINE or self._groups is None or self.dims % EIGHT:
            return ()
        return (CALIBRATED, HADAMARD) if self.asked.kind == CALIBRATED else (HADAMARD,)

    @property
    def _groups(self) -> int | None:
        return _fitting(self.dims, self.group_size)

    def _plain(self, bits: int) -> StreamConstants | None:
        if self.dims % self.group_size:
            return None
        lost = self._lost(AffineCodec(bits, self.group_size))
        return StreamConstants(CodecName(AFFINE, bits), self.group_size, Finding(lost))

    def _transformed(self, kind: str, bits: int) -> StreamConstants:
        group_size = self._groups
        assert group_size is not None
        own = (basis.calibrated if kind == CALIBRATED else basis.hadamard)(self.learned, self.rotation, bits)
        lost = self._lost(TransformCodec(kind, bits, group_size, own, "", self.rotation))
        return StreamConstants(CodecName(kind, bits), group_size, Finding(lost), own, self.sample.rotated_by)

    def _lost(self, codec: Codec) -> float:
        """Of what tells tokens apart, by what an error costs, in the head for which it is worst."""
        x = mx.array(self.sample.values[None], dtype=mx.float32)
        read = codec.decode(codec.encode(x, 0), mx.float32, 0)
        wrong = dataclasses.replace(self.sample, values=np.array(read - x, dtype=np.float64)[0])
        error = basis.still(wrong, self.rotation)[:, self.measured]
        # Where all tokens have the same there is nothing to lose.
        differs = self.spread > 1e-9 * self.whole
        return float(np.where(differs, _size(error, self.cost) / np.maximum(self.spread, 1e-30), 0).max())


def _size(values: Floats, cost: Floats) -> Floats:
    """Of vectors, (heads, tokens, head_dim), all together, by a metric of each head."""
    size: Floats = ((values @ cost) * values).sum(axis=(1, 2))
    return size


def _fitting(dims: int, wanted: int) -> int | None:
    """Values that share a scale: as many as are wanted, where that divides a head; else as many as do."""
    if dims % wanted == 0:
        return wanted
    return next((size for size in range(128, 15, -8) if dims % size == 0), None)


def say(plan: CodecPlan, name: str) -> None:
    """One line of the log, and one for each reason that streams don't have what was asked for."""
    if not plan.findings:
        return
    kinds = Counter(codec.identity.rpartition("-")[0] or "exact" for codec in plan.streams.values())
    log.info(
        "%s: KV as %s (%s); on a short text it loses %.1f%% of what tells tokens apart at most, %.2f%% on average",
        name,
        plan.asked,
        ", ".join(f"{kind} in {count} of {len(plan.streams)} streams" for kind, count in kinds.most_common()),
        100 * max(each.loss for each in plan.findings.values()),
        100 * sum(each.loss for each in plan.findings.values()) / len(plan.findings),
    )
    for reason, streams in _by_reason(plan.findings).items():
        log.warning("%s: not %s for %s: %s", name, plan.asked, _named(streams), reason)


def _by_reason(findings: Mapping[Stream, Finding]) -> dict[str, list[Stream]]:
    found: dict[str, list[Stream]] = {}
    for stream, finding in findings.items():
        if finding.reason:
            found.setdefault(finding.reason, []).append(stream)
    return found


def _named(streams: Sequence[Stream]) -> str:
    named = [f"{'keys' if side == KEYS else 'values'} of cache {leaf}" for leaf, side in streams]
    return ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
