"""Every family's context comes back from its stored KV as it was, or the model is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, RotatingKVCache

from tests.engine.families import FAMILIES, VOCAB, WINDOW, build
from tests.engine.spans import compute, distance, equal, filled, from_disk, needed
from warmkv_server.contract.kv import PartKind, Span
from warmkv_server.contract.kv_choice import KvChoice
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.caches import empty_caches
from warmkv_server.engine.cache.codecs.choose import codecs_chosen, codecs_for
from warmkv_server.engine.cache.layout import CacheMap
from warmkv_server.engine.model.choosing import choose, plan_of
from warmkv_server.engine.model.discover import discover
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.errors import OperatorError

UNINTERRUPTED = 1e-4
"""The largest difference of a logit that another order of the same keys in memory may make, in 32 bits."""

CHUNKS = (24, 48, 61)
LENGTH = CHUNKS[-1]
TOKENS = [(7 * n * n + 11 * n) % VOCAB for n in range(LENGTH + 9 + WINDOW + 2)]

POSITIONS = 4096

model_of = cache(build)


def map_of(name: str, kv: str) -> CacheMap:
    runner, choice, group_size = ModelRunner(model_of(name)), KvChoice.read(kv), FAMILIES[name].group_size
    plan = codecs_chosen(choice, group_size)
    if plan.asked is not None:
        text = [(5 * n * n + 3 * n) % VOCAB for n in range(200)]
        found = choose(runner, choice, group_size, text, None, POSITIONS)
        plan = plan_of(found, runner.model, choice, group_size, POSITIONS)
    return discover(runner, plan)


def leaves(caches: list[Any]) -> list[Any]:
    """As mlx-lm's, which have more to them than the engine asks for."""
    return list(kinds.leaves(caches))


def continuation(model: Any, caches: list[Any]) -> mx.array:
    """Logits of the tokens behind LENGTH, (tokens, vocabulary): a chunk, then steps enough to go round a window."""
    logits = [model(mx.array([TOKENS[LENGTH : LENGTH + 9]]), cache=caches)[0]]
    logits += [model(mx.array([[token]]), cache=caches)[0] for token in TOKENS[LENGTH + 9 :]]
    joined = mx.concatenate(logits)
    mx.eval(joined)
    return joined


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        *((name, kv) for name in FAMILIES for kv in ("affine4", "o4", "exact")),
        ("llama", "affine8"),
        ("gemma3_text", "affine8"),
        ("llama", "k=o5,v=hadamard3"),
    ],
)
def test_a_stored_context_goes_on_as_it_was(name: str, kv: str) -> None:
    model, cache_map = model_of(name), map_of(name, kv)
    running = empty_caches(model, cache_map.codecs)
    spans = needed(compute(model, cache_map, running, TOKENS, 0, CHUNKS), cache_map.layout, LENGTH)

    hot = continuation(model, filled(model, cache_map, spans, LENGTH, room=20))
    restored = continuation(model, filled(model, cache_map, from_disk(spans), LENGTH))
    assert equal(hot, restored)

    uninterrupted = continuation(model, running)
    assert distance(hot, uninterrupted) <= UNINTERRUPTED
    ranked = mx.sort(uninterrupted, axis=-1)
    sure = (ranked[:, -1] - ranked[:, -2]) > UNINTERRUPTED
    assert mx.mean(sure) > 0.5, "the model is too unsure to say anything about its tokens"
    same = mx.argmax(hot, axis=-1) == mx.argmax(uninterrupted, axis=-1)
    assert mx.all(same | ~sure)


@pytest.mark.parametrize("bits", [4, 0])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
def test_sixteen_bit_activations_come_back_bit_for_bit(name: str, dtype: mx.Dtype, bits: int) -> None:
    """As on a GPU. bfloat16 goes to disk as 16-bit integers, which numpy has."""
    model = build(name)
    model.set_dtype(dtype)
    cache_map = discover(ModelRunner(model), codecs_for(bits))
    running = empty_caches(model, cache_map.codecs)
    spans = needed(compute(model, cache_map, running, TOKENS, 0, CHUNKS), cache_map.layout, LENGTH)
    hot = continuation(model, filled(model, cache_map, spans, LENGTH, room=20))
    assert hot.dtype == dtype
    assert equal(hot, continuation(model, filled(model, cache_map, from_disk(spans), LENGTH)))
    assert distance(hot, continuation(model, running)) <= 0.05 * distance(hot, mx.zeros_like(hot))
    assert all(spec.dtype != "bfloat16" for spec in cache_map.layout.tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_tells_what_a_context_is_made_of(name: str) -> None:
    family, model, cache_map = FAMILIES[name], model_of(name), map_of(name, "affine4")
    spans = compute(model, cache_map, empty_caches(model, cache_map.codecs), TOKENS, 0, [LENGTH])
    layout = cache_map.layout
    assert layout.window == (WINDOW if "window" in family.kinds else 0)
    assert layout.has_state == ("state" in family.kinds)
    assert set(spans[0].parts) == set(family.kinds)
    for kind, tensors in spans[0].parts.items():
        specs = {spec.name: spec for spec in layout.of_kind(kind)}
        assert specs.keys() == tensors.keys()
        for tensor, array in tensors.items():
            spec = specs[tensor]
            streams, heads, width = spec.shape if kind != PartKind.STATE else (0, 0, 0)
            shape = spec.shape if kind == PartKind.STATE else (streams, heads, LENGTH, width)
            assert (array.shape, str(array.dtype)) == (shape, f"mlx.core.{spec.dtype}")
            assert array.nbytes == spec.nbytes * (1 if kind == PartKind.STATE else LENGTH)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "append" in family.kinds])
def test_four_bits_keep_an_append_only_token_in_a_third_of_sixteen(name: str) -> None:
    sixteen = map_of(name, "exact").layout.nbytes(PartKind.APPEND) / 2  # the models here run in 32 bits
    four = map_of(name, "affine4").layout.nbytes(PartKind.APPEND)
    assert sixteen / four == pytest.approx(3.2 if FAMILIES[name].group_size == 32 else 3.5556, abs=1e-3)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if set(family.kinds) == {"append"}])
def test_an_append_only_context_is_cut_at_any_token(name: str) -> None:
    model, cache_map = model_of(name), map_of(name, "affine4")
    running = empty_caches(model, cache_map.codecs)
    spans = compute(model, cache_map, running, TOKENS, 0, CHUNKS)
    for length in (60, 25, 24, 1):
        for leaf in leaves(running):
            leaf.trim(leaf.offset - length)
        trimmed = model(mx.array([TOKENS[:5]]), cache=running)
        again = filled(model, cache_map, [span for span in spans if span.start < length], length)
        assert distance(model(mx.array([TOKENS[:5]]), cache=again), trimmed) <= UNINTERRUPTED


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "window" in family.kinds])
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1])
def test_a_window_that_is_just_full_comes_back(name: str, length: int) -> None:
    model, cache_map = model_of(name), map_of(name, "affine4")
    running = empty_caches(model, cache_map.codecs)
    spans = needed(compute(model, cache_map, running, TOKENS, 0, [length]), cache_map.layout, length)
    assert sum(span.count for span in spans if PartKind.WINDOW in span.parts) == min(length, WINDOW)
    again = filled(model, cache_map, spans, length)
    for leaf in leaves(again):
        assert leaf.offset == length
    assert distance(continuation(model, again), continuation(model, running)) <= UNINTERRUPTED


def test_sinks_and_shared_layers_make_a_difference() -> None:
    """Otherwise the two families would show nothing that a plain model doesn't."""
    sinks = build("gpt_oss_sinks")
    with_sinks = sinks(mx.array([TOKENS]))
    for layer in sinks.layers:
        layer.self_attn.sinks = layer.self_attn.sinks - 100
    assert distance(sinks(mx.array([TOKENS])), with_sinks) > 100 * UNINTERRUPTED
    shared = model_of("gemma4_shared_kv")
    assert len(shared.layers) > len(shared.make_cache())


def test_too_little_kv_is_never_taken_for_a_context() -> None:
    """The store's mistake, if it ever makes one, ends a request instead of changing an answer."""

    def lacking(name: str, kind: PartKind, end: int) -> list[Span]:
        model, cache_map = model_of(name), map_of(name, "affine4")
        spans = compute(model, cache_map, empty_caches(model, cache_map.codecs), TOKENS, 0, CHUNKS)
        return [
            Span(span.start, span.count, {k: part for k, part in span.parts.items() if k is not kind or span.end > end})
            for span in spans
        ]

    cases = [
        ("llama", lacking("llama", PartKind.APPEND, CHUNKS[0]), LENGTH),
        ("gemma3_text", lacking("gemma3_text", PartKind.WINDOW, CHUNKS[1]), LENGTH - 10),
        ("gemma3_text", lacking("gemma3_text", PartKind.WINDOW, LENGTH), LENGTH),
        ("mamba2", lacking("mamba2", PartKind.STATE, LENGTH), LENGTH),
        ("mamba2", lacking("mamba2", PartKind.STATE, 0), LENGTH - 1),
    ]
    for name, spans, length in cases:
        with pytest.raises((KeyError, IndexError, AssertionError)):
            filled(model_of(name), map_of(name, "affine4"), spans, length)


@pytest.mark.parametrize("cache_class", [ConcatenateKVCache, lambda: RotatingKVCache(32, keep=4)])
def test_a_cache_that_cannot_be_kept_is_refused_by_name(cache_class: Any) -> None:
    model = build("llama")
    model.make_cache = lambda: [KVCache(), cache_class()]
    with pytest.raises(OperatorError, match=r"RotatingKVCache|ConcatenateKVCache"):
        discover(ModelRunner(model), codecs_for())


def test_a_dimension_that_does_not_divide_is_refused_with_the_group_size_that_does() -> None:
    with pytest.raises(OperatorError, match=r"layer 0 .*dimension 96.*group size 64.*--kv-group-size 32"):
        discover(ModelRunner(model_of("phi3_head_dim_96")), codecs_for(4, 64))
    with pytest.raises(OperatorError, match=r"layer 0 .*dimension 64.*group size 128.*--kv-group-size 64"):
        discover(ModelRunner(model_of("llama")), codecs_for(4, 128))
