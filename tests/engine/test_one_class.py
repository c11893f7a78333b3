"""A codec and a kind of cache are one class each: these two are known nowhere else, and do all that the others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import ConcatenateKVCache

from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES, VOCAB
from tests.engine.runs import CHUNK, Outcome, Solo, check_greedy, check_growth, job_of, outcomes, prompt_of, running
from tests.engine.spans import distance
from tests.engine.stored import check_hot_equals_warm
from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.kv import PartKind
from warmkv_server.engine.cache.attention_shapes import AttentionShapes
from warmkv_server.engine.cache.caches import QuantiseFirst
from warmkv_server.engine.cache.codecs.affine import AffineCodec
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.codec import KEYS, VALUES, CodecPlan, Component, LayerCodec, Position, Words
from warmkv_server.errors import OperatorError

KINDS = ["llama", "gemma3_text", "gemma4_shared_kv", "deepseek_v3", "falcon_h1", "llama4_chunked"]
"""A family of each kind of cache."""

ROUNDED = 0.3
"""How far keys and values of 16 bits may move what follows from them. Those of another place move it by all of it."""


@dataclass(frozen=True)
class BrainFloats:
    """Stores values as 16-bit brain floats, times a power of two that depends on the position.

    So words that are read as those of another position than they were made for give something else altogether.
    """

    bits: int = 16
    group_size: int = 0
    identity: str = "brain floats"

    def components(self, head_dim: int, _: mx.Dtype) -> tuple[Component, ...]:
        return (Component("brain", head_dim, mx.bfloat16),)

    def encode(self, x: mx.array, start: Position) -> Words:
        return ((x * self._factors(x.shape[-2], start).astype(x.dtype)).astype(mx.bfloat16),)

    def decode(self, words: Words, dtype: mx.Dtype, start: Position) -> mx.array:
        (brain,) = words
        return brain.astype(dtype) / self._factors(brain.shape[-2], start).astype(dtype)

    def step(self, x: mx.array, start: Position) -> tuple[Words, mx.array]:
        words = self.encode(x, start)
        return words, self.decode(words, x.dtype, start)

    def words_of(self, stepped: Words, _: Position) -> Words:
        return stepped

    def _factors(self, tokens: int, start: Position) -> mx.array:
        first = start if isinstance(start, int) else mx.array(start).reshape(-1, 1)
        return mx.power(2.0, (first + mx.arange(tokens)) % 7).reshape(-1, 1, tokens, 1)


def reported(got: Outcome) -> mx.array:
    """Log-probabilities of the first token of an answer, (vocabulary,)."""
    told = mx.zeros(VOCAB)
    for token, logprob in got.logprobs[0].top:
        told[token] = logprob
    return told


@pytest.mark.parametrize("name", KINDS)
async def test_a_codec_of_its_own_goes_through_the_engine_and_the_store(
    name: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    tokens, new = prompt_of(300), prompt_of(6, seed=4)  # the last window begins behind a block
    async with running(folder_of(name), codecs=CodecPlan(BrainFloats())) as engine:
        words = [spec for spec in engine.info.layout.tensors if spec.kind != PartKind.STATE]
        assert words
        assert {(spec.name.rpartition(".")[2], spec.dtype) for spec in words} == {("brain", "uint16")}
        assert (engine.info.kv_bits, engine.info.fingerprint_fields["kv_codec"]) == (16, "brain floats")
        got = await check_hot_equals_warm(engine, tmp_path, tokens, new, VOCAB)
    async with running(folder_of(name), FAMILIES[name].group_size, kv_bits=0) as engine:
        (as_computed,) = await outcomes(engine, [job_of([*tokens, *new], 1, top_logprobs=VOCAB)])
    assert distance(reported(got), reported(as_computed)) < ROUNDED


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
async def test_words_are_made_for_their_places_in_rows_of_any_length(name: str, folder_of: FolderOf) -> None:
    """In a batch, whose words are gathered after some steps, rows are padded on their left."""
    nines = Sampling(logit_bias={9: 1000.0})  # one answer, whatever rounding says
    jobs = [job_of(prompt_of(length), 70, sampling=nines) for length in (20, 23, 24)]
    async with running(folder_of(name), codecs=CodecPlan(BrainFloats())) as engine:
        stored = await outcomes(engine, jobs)
    async with running(folder_of(name), kv_bits=0) as engine:
        computed = await outcomes(engine, jobs)
    for job, one, other in zip(jobs, stored, computed, strict=True):
        check_growth(one.finished.growth, 0, len(job.tokens) + 70)
        for kind, tensors in one.finished.growth.tensors.items():
            for tensor, words in tensors.items():
                (values,) = [a for t, a in other.finished.growth.tensors[kind].items() if t[:3] == tensor[:3]]
                read = BrainFloats().decode((words.view(mx.bfloat16),), mx.float32, 0)
                assert distance(read, values) < ROUNDED


async def test_streams_can_differ(folder_of: FolderOf, tmp_path: Path) -> None:
    """Keys in 8 bits and values in 4, one layer's values as computed, another's keys in a codec of its own."""
    codecs = CodecPlan(
        AffineCodec(4),
        {(0, KEYS): AffineCodec(8), (2, KEYS): AffineCodec(8), (1, VALUES): AsComputed(), (3, KEYS): BrainFloats()},
    )
    tokens, new = prompt_of(2 * CHUNK + 11), prompt_of(6, seed=4)
    async with running(folder_of("gemma3_text"), codecs=codecs) as engine:
        await check_hot_equals_warm(engine, tmp_path, tokens, new, VOCAB)
        widths = {
            (spec.kind, spec.shape[0], spec.nbytes * 8 // spec.shape[0] // 64)
            for spec in engine.info.layout.tensors
            if spec.name.rpartition(".")[2] in ("words", "values", "brain")
        }
    assert widths == {
        (PartKind.WINDOW, 2, 8),  # keys of 0 and 2
        (PartKind.WINDOW, 2, 4),  # values of 0 and 2
        (PartKind.APPEND, 2, 4),  # keys of 1, values of 3
        (PartKind.APPEND, 1, 32),  # values of 1
        (PartKind.APPEND, 1, 16),  # keys of 3
    }


class Chain(ConcatenateKVCache):
    """What a toy model of another library's keeps its context in: every step a longer array."""


class ChainCache(QuantiseFirst, Chain, stands_for=Chain):
    """The kind of cache that stands for it."""

    kind = PartKind.APPEND

    def __init__(self, codec: LayerCodec) -> None:
        super().__init__()
        self.record_with(codec)

    @classmethod
    def in_place_of(cls, _stock: Any, codec: LayerCodec, _: AttentionShapes | None) -> Self:
        return cls(codec)

    def fill(self, keys: mx.array, values: mx.array, length: int) -> None:
        self.keys, self.values, self.offset = keys[..., :length, :], values[..., :length, :], length


def keeping_chains(monkeypatch: pytest.MonkeyPatch, chain: type[Any]) -> None:
    monkeypatch.setattr(llama.Model, "make_cache", lambda model: [chain() for _ in model.layers])


@pytest.mark.parametrize("bits", [4, 0])
async def test_a_kind_of_cache_of_its_own(
    bits: int, folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill in chunks, decoding beside others (each by itself, since it has no batch), save and load."""
    solo = Solo(folder_of("llama"))
    keeping_chains(monkeypatch, Chain)
    tokens, new = prompt_of(2 * CHUNK + 11), prompt_of(6, seed=4)
    async with running(folder_of("llama"), kv_bits=bits) as engine:
        assert [layer.cache_kind for layer in engine.info.layers] == ["append", "append"]
        prompts: list[Sequence[int]] = [prompt_of(20), prompt_of(21), prompt_of(CHUNK + 1)]
        for prompt, got in zip(prompts, await outcomes(engine, [job_of(p, 70) for p in prompts]), strict=True):
            if bits:
                check_greedy(got.tokens, solo.answer(prompt, 70))
            check_growth(got.finished.growth, 0, len(prompt) + 70)
        got = await check_hot_equals_warm(engine, tmp_path, tokens, new, VOCAB)
        if bits:
            check_greedy(got.tokens, solo.answer([*tokens, *new], 4))


async def test_without_that_class_the_model_is_refused(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping_chains(monkeypatch, type("OtherChain", (Chain,), {}))
    with pytest.raises(OperatorError, match="OtherChain"):
        async with running(folder_of("llama")):
            pass
