"""What a job has grown carries the next one: the engine's side of hot and warm."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

import mlx.core as mx
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES, VOCAB
from tests.engine.runs import (
    CHUNK,
    TOLERANCE,
    Outcome,
    Solo,
    after,
    check_greedy,
    check_growth,
    job_of,
    outcome,
    outcomes,
    prompt_of,
    running,
)
from tests.engine.spans import cut, distance, filled, from_disk, grown, needed
from tests.engine.tokenizers import built_in, ids
from warmkv_server.contract.generation import Answer, Finish, Job, Sampling
from warmkv_server.contract.kv import Growth, PartKind, Span
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.engine import Engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER = 4


@dataclass
class Bench:
    engine: Engine
    solo: Solo

    async def prefill(self, tokens: list[int], **job: object) -> Growth:
        got = await outcome(self.engine.submit(Job(tokens, **job)))  # type: ignore[arg-type]
        assert got.finished.finish is Finish.PREFILLED
        return got.finished.growth

    def kept(self, growths: list[Growth], length: int) -> list[Span]:
        return needed(grown(growths, length), self.engine.info.layout, length)

    def logits(self, spans: list[Span], length: int, token: int) -> mx.array:
        """Behind this token, on the KV of the `length` tokens before it."""
        loaded = self.solo.loaded
        logits: mx.array = loaded.model(
            mx.array([[token]]), cache=filled(loaded.model, loaded.cache_map, spans, length)
        )
        return logits


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=FAMILIES)
async def bench(request: pytest.FixtureRequest, folder_of: FolderOf) -> AsyncIterator[Bench]:
    folder, group_size = folder_of(request.param), FAMILIES[request.param].group_size
    async with running(folder, group_size) as engine:
        yield Bench(engine, Solo(folder, codecs_for(kv_group_size=group_size)))


def reported(got: Outcome) -> list[tuple[int, float]]:
    """Every logprob of every step."""
    return [pair for each in got.logprobs for pair in each.top]


async def test_a_conversation_goes_on_from_what_each_turn_grew(bench: Bench) -> None:
    """Prime, answer, follow-up, each on the KV of the one before: the answers are those of one uninterrupted run."""
    tokens = prompt_of(70)
    growths = [await bench.prefill(tokens)]
    check_growth(growths[0], 0, 70)
    for turn in range(2):
        held = len(tokens)
        tokens = [*tokens, *prompt_of(5 + turn, seed=turn)]
        job = after(tokens, bench.kept(growths, held), held, Answer(max_tokens=ANSWER, ignore_eos=True))
        got = await outcome(bench.engine.submit(job))
        check_greedy(got.tokens, bench.solo.answer(tokens, ANSWER))
        tokens += got.tokens
        growths.append(got.finished.growth)
        check_growth(growths[-1], held, len(tokens))
    # The KV of prompts and answers together is a context like any other.
    last = tokens[held]
    pieced = bench.logits(bench.kept(growths, held), held, last)
    uninterrupted = bench.logits(bench.solo.context(tokens[: held + 1])[2], held, last)
    assert distance(pieced, uninterrupted) <= TOLERANCE


async def test_hot_and_warm_give_the_same_logits_bit_for_bit(bench: Bench) -> None:
    tokens = prompt_of(75)
    growth = await bench.prefill(tokens[:69])
    hot = bench.kept([growth], 69)
    answer = Answer(max_tokens=ANSWER, ignore_eos=True, top_logprobs=VOCAB)
    first = await outcome(bench.engine.submit(after(tokens, hot, 69, answer)))
    restored = await outcome(bench.engine.submit(after(tokens, from_disk(hot), 69, answer)))
    assert len(reported(first)) == ANSWER * VOCAB
    assert reported(first) == reported(restored)
    assert first.tokens == restored.tokens


async def test_a_snapshot_is_taken_where_it_was_asked_for(bench: Bench) -> None:
    """And the context goes on from there as from its end."""
    tokens = prompt_of(70)
    growth = await bench.prefill(tokens, snapshot_at=frozenset({20, CHUNK, 50, 69}))
    if not bench.engine.info.layout.has_state:
        assert not growth.snapshots
        return
    assert set(growth.snapshots) == {20, CHUNK, 50, 69, 70}
    for length in (20, 69):
        spans = [
            Span(span.start, span.count, {**span.parts, PartKind.STATE: growth.snapshots[length]})
            for span in [cut(grown([growth], 70)[0], 0, length)]
        ]
        job = after(tokens, spans, length, Answer(max_tokens=ANSWER, ignore_eos=True))
        got = await outcome(bench.engine.submit(job))
        check_greedy(got.tokens, bench.solo.answer(tokens, ANSWER))
        check_growth(got.finished.growth, length, 70 + ANSWER)
        assert set(got.finished.growth.snapshots) >= {70 + ANSWER}


async def test_no_snapshot_is_left_of_a_token_behind_a_stop_string(bench: Bench) -> None:
    """Half a letter is spelled with the token after it, which is dropped when the half was the stop string."""
    prompt, (half, _), (_, one) = prompt_of(20), ids(built_in(), "é"), ids(built_in(), " 1")
    sampling = Sampling(logit_bias={half: 1000.0, one: 900.0}, presence_penalty=500.0)
    got = await outcome(bench.engine.submit(job_of(prompt, 5, sampling=sampling, stop=("\ufffd",))))
    assert got.tokens == [half, one]
    assert got.finished.completion == (half,)
    check_growth(got.finished.growth, 0, 21)


async def test_sequences_with_and_without_a_reused_prefix_decode_together(bench: Bench) -> None:
    tokens = prompt_of(66)
    growth = await bench.prefill(tokens[:60])
    reusing = after(tokens, bench.kept([growth], 60), 60, Answer(max_tokens=ANSWER, ignore_eos=True))
    for got in await outcomes(bench.engine, [job_of(tokens, ANSWER), reusing, job_of(tokens, ANSWER)]):
        check_greedy(got.tokens, bench.solo.answer(tokens, ANSWER))


@settings(max_examples=4, deadline=None)
@given(edges=st.sets(st.integers(1, 69), max_size=5))
async def test_how_the_context_is_divided_into_spans_changes_nothing(bench: Bench, edges: set[int]) -> None:
    tokens = prompt_of(75)
    whole = bench.kept([await bench.prefill(tokens[:70])], 70)
    bounds = [0, *sorted(edges), 70]
    pieces = [
        cut(span, start, end)
        for span in whole
        for start, end in itertools.pairwise(bounds)
        if max(start, span.start) < min(end, span.end)
    ]
    answer = Answer(max_tokens=2, ignore_eos=True, top_logprobs=VOCAB)
    divided, joined = [
        await outcome(bench.engine.submit(after(tokens, spans, 70, answer))) for spans in (pieces, whole)
    ]
    assert reported(divided) == reported(joined)
