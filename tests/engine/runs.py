"""Running jobs on an engine, and the same jobs alone, step by step, without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from tests.engine.spans import compute
from warmkv_server.contract.generation import Answer, Delta, Event, Finished, Job, Logprobs
from warmkv_server.contract.kv import Growth, Reuse, Span
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.cache.attention_shapes import AttentionShapes
from warmkv_server.engine.cache.caches import empty_caches
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.cache.codecs.codec import CodecPlan
from warmkv_server.engine.engine import Engine, Handle
from warmkv_server.engine.model import load as model

CHUNK = 32
"""Tokens of a prefill chunk in these tests; smaller than any operator's, so that short prompts have several."""

FEW_SHAPES = AttentionShapes(mx.float32, step=64, fine=16, smallest=8, long=48)
"""Those of attention that a test has a CPU take: small, so that short prompts are padded and cross several steps."""

TOLERANCE = 1e-2
"""How far batching and other chunks may move a logit of the models here, in 32 bits: rounding, mostly where it turns a
quantised word. Two tokens whose logits are closer than twice as much may change places."""


_SET = {each.name for each in fields(Settings)}


@asynccontextmanager
async def running(folder: Path | str, group_size: int = 64, **changes: Any) -> AsyncIterator[Engine]:
    """An engine on this model, stopped at the end.

    Args:
        changes: of settings, or of what else an engine is started with.
    """
    chosen: dict[str, Any] = {"model": str(folder), "kv_group_size": group_size, "prefill_chunk": CHUNK}
    chosen |= {name: changes.pop(name) for name in _SET & changes.keys()}
    engine = await Engine.start(Settings(**chosen), **changes)
    try:
        yield engine
    finally:
        await engine.stop()


def become(monkeypatch: pytest.MonkeyPatch, subclass: Callable[[type[Any]], type[Any]]) -> None:
    """Let models loaded from now on be of a subclass of their own class."""
    load = model.load

    def load_and_change(spec: str, **options: Any) -> model.LoadedModel:
        loaded = load(spec, **options)
        loaded.model.__class__ = subclass(type(loaded.model))
        return loaded

    monkeypatch.setattr(model, "load", load_and_change)


def counting(calls: list[tuple[int, int]]) -> Callable[[type[Any]], type[Any]]:
    """For `become`: note the rows and tokens of every call."""

    def subclass(real: type[Any]) -> type[Any]:
        def call(self: Any, inputs: mx.array, *rest: Any, **options: Any) -> Any:
            rows, tokens = inputs.shape
            calls.append((rows, tokens))
            return real.__call__(self, inputs, *rest, **options)

        return type("Counting", (real,), {"__call__": call})

    return subclass


@dataclass
class Outcome:
    """All that a handle gave."""

    events: list[Event] = field(default_factory=list)

    @property
    def deltas(self) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta)]

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def logprobs(self) -> list[Logprobs]:
        return [each for delta in self.deltas for each in delta.logprobs]

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last


async def outcome(handle: Handle) -> Outcome:
    """Read it to its end."""
    return Outcome([event async for event in handle])


async def begun(handle: Handle, count: int = 1) -> Handle:
    """Read so many tokens of it."""
    deltas = 0
    async for event in handle:
        deltas += isinstance(event, Delta)
        if deltas == count:
            break
    return handle


async def outcomes(engine: Engine, jobs: Sequence[Job]) -> list[Outcome]:
    """Run them together."""
    handles = [engine.submit(job) for job in jobs]
    return await asyncio.gather(*(outcome(handle) for handle in handles))


def prompt_of(length: int, seed: int = 0, vocab: int = 320) -> list[int]:
    """Tokens without a pattern, none of them special."""
    state, tokens = seed * 7919 + 12345, []
    for _ in range(length):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        tokens.append(8 + (state >> 8) % (vocab - 8))
    return tokens


def job_of(prompt: Sequence[int], max_tokens: int, **answer: Any) -> Job:
    """Generate greedily up to a length."""
    return Job(prompt, answer=Answer(max_tokens=max_tokens, **{"ignore_eos": True, **answer}))


def after(tokens: Sequence[int], spans: Sequence[Span], length: int, answer: Answer | None) -> Job:
    """Go on from the first `length` tokens' KV."""
    return Job(tokens, Reuse(length, tuple(spans), hot_tokens=length), answer)


@dataclass(frozen=True)
class Step:
    """A greedy token of a run alone, and how far the runner-up's logit was below its own."""

    token: int
    margin: float


class Solo:
    """A model on the test's own thread. Weights, caches and chunks are the engine's; nothing of its loop is."""

    def __init__(self, folder: Path | str, codecs: CodecPlan | None = None) -> None:
        self.loaded = model.load(str(folder), adapter=None, codecs=codecs or codecs_for(), context_limit=None)

    def answer(self, prompt: Sequence[int], count: int) -> list[Step]:
        """The greedy answer to a prompt."""
        logits, caches, _ = self.context(prompt)
        steps = []
        for _ in range(count):
            steps.append(_step(logits))
            logits = self.loaded.model(mx.array([[steps[-1].token]]), cache=caches)[0, -1]
        return steps

    def logits(self, tokens: Sequence[int]) -> mx.array:
        """Of the token that follows these, (vocabulary,)."""
        return self.context(tokens)[0]

    def context(self, tokens: Sequence[int]) -> tuple[mx.array, list[Any], list[Span]]:
        """Logits behind these tokens, the caches that hold them, and their KV."""
        cache_map = self.loaded.cache_map
        caches = empty_caches(self.loaded.model, cache_map.codecs)
        last = len(tokens) - 1
        ends = [*range(CHUNK, last, CHUNK), last] if last else []
        spans = compute(self.loaded.model, cache_map, caches, tokens, 0, ends)
        logits = self.loaded.model(mx.array([[tokens[-1]]]), cache=caches)[0, -1]
        mx.eval(logits)
        return logits, caches, spans


def check_greedy(tokens: Sequence[int], alone: Sequence[Step]) -> int:
    """Fail unless the tokens are those of a run alone, up to a place where that run was unsure.

    Returns how many tokens were compared.
    """
    for place, (token, step) in enumerate(zip(tokens, alone, strict=False)):
        if token != step.token:
            assert step.margin <= 2 * TOLERANCE, (
                f"token {place} is {token} and not {step.token}, which alone leads by {step.margin:.4f}"
            )
            return place
    return min(len(tokens), len(alone))


def check_growth(growth: Growth, start: int, end: int) -> None:
    """Fail unless it is whole: exactly the tokens [start, end) in every tensor."""
    assert (growth.start, growth.end) == (start, end)
    assert all(start < length <= end for length in growth.snapshots)
    for tensors in growth.tensors.values():
        for name, array in tensors.items():
            assert array.shape[2] == end - start, name


def _step(logits: mx.array) -> Step:
    ranked = mx.sort(logits)
    return Step(cast(int, mx.argmax(logits).item()), cast(float, (ranked[-1] - ranked[-2]).item()))
