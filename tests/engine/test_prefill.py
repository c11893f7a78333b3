"""Where prefill chunks end: by position alone, so that the same context is computed the same way, hot or warm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest
import pytest_asyncio

from tests.engine.conftest import FolderOf
from tests.engine.runs import CHUNK, Solo, after, become, counting, job_of, outcome, prompt_of, running
from tests.engine.spans import grown
from warmkv_server.contract.generation import Answer, Job
from warmkv_server.engine.engine import Engine


@dataclass
class Bench:
    engine: Engine
    calls: list[tuple[int, int]]
    """(rows, tokens) of each call of the model."""

    async def chunks(self, job: Job) -> list[int]:
        """Tokens of each call that the job takes, alone."""
        self.calls.clear()
        await outcome(self.engine.submit(job))
        assert all(rows == 1 for rows, _ in self.calls)
        return [tokens for _, tokens in self.calls]


@pytest_asyncio.fixture
async def bench(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    calls: list[tuple[int, int]] = []
    become(monkeypatch, counting(calls))
    async with running(folder_of("llama")) as engine:
        yield Bench(engine, calls)


async def test_chunks_end_at_multiples_of_their_size(bench: Bench) -> None:
    tokens = prompt_of(3 * CHUNK + 5)
    assert await bench.chunks(Job(tokens)) == [CHUNK, CHUNK, CHUNK, 5]
    assert await bench.chunks(Job(tokens[: 2 * CHUNK])) == [CHUNK, CHUNK]


async def test_the_last_token_of_a_prompt_is_fed_alone(bench: Bench) -> None:
    """Its logits choose the first token; then each token of the answer is fed, the last one too."""
    assert await bench.chunks(job_of(prompt_of(CHUNK + 4), 3)) == [CHUNK, 3, 1, 1, 1, 1]
    assert await bench.chunks(job_of(prompt_of(1), 1)) == [1, 1]


@pytest.mark.parametrize("reused", [1, 20, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4])
async def test_a_reused_prefix_moves_no_boundary(reused: int, bench: Bench) -> None:
    tokens = prompt_of(2 * CHUNK + 5)
    spans = grown([(await outcome(bench.engine.submit(Job(tokens)))).finished.growth], len(tokens))
    ends = [end for end in (CHUNK, 2 * CHUNK, 2 * CHUNK + 4) if end > reused]
    sizes = [end - start for start, end in zip([reused, *ends], ends, strict=False)]
    assert await bench.chunks(after(tokens, spans, reused, Answer(max_tokens=1))) == [*sizes, 1, 1]


async def test_a_chunk_ends_where_a_snapshot_is_wanted(bench: Bench) -> None:
    job = Job(prompt_of(2 * CHUNK), snapshot_at=frozenset({10, CHUNK, CHUNK + 1, 500}))
    assert await bench.chunks(job) == [10, CHUNK - 10, 1, CHUNK - 1]


async def test_rows_of_like_length_share_a_call(bench: Bench) -> None:
    """And others don't: at most a quarter of a batch may be padding."""
    bench.calls.clear()
    handles = [bench.engine.submit(job_of(prompt_of(length), 40)) for length in (40, 41, 42, 300)]
    for handle in handles:
        await outcome(handle)
    rows = [rows for rows, tokens in bench.calls if tokens == 1]
    assert max(rows) == 3


@pytest.mark.parametrize(("tokens", "early"), [([1], True), ([1, 2, 3], False)])
async def test_on_a_cpu_each_layer_of_a_step_is_under_way_while_the_next_is_described(
    tokens: list[int], early: bool, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the device would wait for the whole description."""
    loaded = Solo(folder_of("llama")).loaded
    caches, begun = loaded.cache_map.empty_caches(loaded.model), []
    begin: Any = mx.async_eval

    def noted(*arrays: Any) -> None:
        begun.append(arrays)
        begin(*arrays)

    monkeypatch.setattr(mx, "async_eval", noted)
    logits = loaded.model(mx.array([tokens]), cache=caches)
    assert len(begun) == (len(caches) if early else 0)
    mx.eval(logits)
