"""Few shapes of attention, which CUDA wants: chunks are padded and rows fed twice, and nothing else changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import mlx.core as mx
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from tests.engine import families
from tests.engine.conftest import FolderOf
from tests.engine.runs import (
    CHUNK,
    FEW_SHAPES,
    Solo,
    after,
    become,
    check_greedy,
    check_growth,
    counting,
    job_of,
    outcome,
    outcomes,
    prompt_of,
    running,
)
from tests.engine.spans import equal, from_disk, grown
from tests.engine.test_need import within
from warmkv_server.contract.generation import Answer, Job
from warmkv_server.contract.kv import TOKEN_AXIS, Growth, PartKind
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.attention_shapes import AttentionShapes
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.model import discover
from warmkv_server.engine.model.fitting import takes
from warmkv_server.engine.model.runner import ModelRunner


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def few(folder_of: FolderOf) -> AsyncIterator[tuple[Engine, Solo, list[tuple[int, int]]]]:
    """An engine whose model is given few shapes, the same model without, and the rows and tokens of every call."""
    solo = Solo(folder_of("llama"))
    calls: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discover, "attention_shapes", lambda *_: FEW_SHAPES)
        become(patch, counting(calls))
        async with running(folder_of("llama"), max_decode_gap_ms=60_000) as engine:
            yield engine, solo, calls


def check_words(growth: Growth, solo: Solo, tokens: Sequence[int]) -> None:
    """Fail unless the growth is these tokens' and has, but for rounding, the words of a run alone."""
    check_growth(growth, 0, len(tokens))
    spans = solo.context([*tokens, 0])[2]
    for name, array in growth.tensors[PartKind.APPEND].items():
        if name.endswith(".words"):
            alone = mx.concatenate([span.parts[PartKind.APPEND][name] for span in spans], axis=TOKEN_AXIS)
            assert bool((array.view(mx.uint8) == alone.view(mx.uint8)).mean() >= 0.98)


Few = tuple[Engine, Solo, list[tuple[int, int]]]


@pytest.mark.asyncio(loop_scope="module")
async def test_chunks_have_few_lengths_and_the_answer_is_the_same(few: Few) -> None:
    engine, solo, calls = few
    for length in (2, 9, 21, 40, 64, 65, 97, 150):
        calls.clear()
        prompt = prompt_of(length, length)
        got = await outcome(engine.submit(job_of(prompt, 4)))
        lengths = {tokens for _, tokens in calls if tokens > 1}
        assert lengths <= {8, 16, CHUNK}
        check_greedy(got.tokens, solo.answer(prompt, 4))
        check_words(got.finished.growth, solo, [*prompt, *got.tokens])


@pytest.mark.asyncio(loop_scope="module")
async def test_from_disk_is_bit_for_bit_from_ram(few: Few) -> None:
    engine, solo, _ = few
    prompt = prompt_of(200, 7)
    for held in (64, 90, 127, 128):
        primed = await outcome(engine.submit(Job(prompt[:held])))
        hot = grown([primed.finished.growth], held)
        for new in (1, 5, 40):
            answer = Answer(max_tokens=4, ignore_eos=True, top_logprobs=4)
            first, second = [
                await outcome(engine.submit(after(prompt[: held + new], spans, held, answer)))
                for spans in (hot, from_disk(hot))
            ]
            assert first.logprobs == second.logprobs
            assert_same(first.finished.growth.tensors, second.finished.growth.tensors)
            check_greedy(first.tokens, solo.answer(prompt[: held + new], 4))


def assert_same(one: object, other: object) -> None:
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    for name, array in one[PartKind.APPEND].items():
        assert equal(array, other[PartKind.APPEND][name])


@pytest.mark.asyncio(loop_scope="module")
async def test_long_padded_rows_are_fed_two_tokens_and_answer_as_alone(few: Few) -> None:
    engine, solo, calls = few
    prompts = [prompt_of(length, length) for length in (60, 57, 63)]
    calls.clear()
    got = await outcomes(engine, [job_of(prompt, 12) for prompt in prompts])
    assert (3, 2) in calls
    for prompt, each in zip(prompts, got, strict=True):
        check_greedy(each.tokens, solo.answer(prompt, 12))
        check_words(each.finished.growth, solo, [*prompt, *each.tokens])


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("lengths", "answer"), [((30, 30, 30), 40), ((20, 19), 20)], ids=["even", "short"])
async def test_rows_of_one_length_and_short_ones_are_fed_one(few: Few, lengths: Sequence[int], answer: int) -> None:
    engine, solo, calls = few
    calls.clear()
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    got = await outcomes(engine, [job_of(prompt, answer) for prompt in prompts])
    assert {call for call in calls if call[0] > 1} == {(len(lengths), 1)}
    for prompt, each in zip(prompts, got, strict=True):
        check_greedy(each.tokens, solo.answer(prompt, answer))


async def test_what_padding_takes_was_foreseen(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "attention_shapes", lambda *_: AttentionShapes(mx.float32))
    async with running(folder_of("llama"), prefill_chunk=256) as engine:
        jobs = [job_of(prompt_of(length), 40) for length in (300, 310)]
        with within(engine, jobs, 3):
            await outcomes(engine, jobs)


@given(held=st.integers(0, 5000), new=st.integers(1, 3000))
def test_caches_never_have_more_room_than_was_foreseen(held: int, new: int) -> None:
    shapes = AttentionShapes(mx.bfloat16)
    tokens, length = shapes.chunk(held, held + new)
    assert new <= tokens < max(2 * new, new + shapes.fine, shapes.smallest + 1)
    assert held + tokens <= length
    assert shapes.capacity(length) <= shapes.room(held + new)


def test_a_mask_hides_what_comes_later_and_what_is_behind_the_end() -> None:
    seen = FEW_SHAPES.mask(20, 16)
    assert seen is not None
    assert seen.shape == (16, 64)
    for token in range(16):
        assert (seen[token] == 0).tolist() == [at <= 20 + token for at in range(64)]
    assert FEW_SHAPES.mask(48, 16) is None


def test_capacities_are_what_was_asked_for() -> None:
    cache = kinds.AppendCache(codecs_for().of_layer(0), FEW_SHAPES)
    # Up to `long` not a multiple of 256, and else one of the step.
    for tokens, read, capacity in ((5, 64, 64), (59, 64, 64), (1, 65, 128), (300, 384, 384)):
        keys, _ = cache.update_and_fetch(*2 * [mx.ones((1, 1, tokens, 64))])
        assert keys.shape[-2] == read
        assert cache.keys is not None
        assert cache.keys.shape[-2] == capacity
    assert AttentionShapes(mx.bfloat16).capacity(8192) % 256
    assert not AttentionShapes(mx.bfloat16).capacity(9216) % 256


@pytest.mark.parametrize(
    ("family", "taken"), [("llama", True), ("qwen3", True), ("qwen3_moe", True), ("deepseek_v3", False)]
)
def test_a_model_is_tried_before_it_is_given_masks_of_numbers(family: str, taken: bool) -> None:
    assert takes(ModelRunner(families.build(family)), FEW_SHAPES) is taken
