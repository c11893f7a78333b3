"""Perplexity, divergence and agreement of quantised KV, after a round trip through the real store.

For each window of text the context is prefilled, committed, dropped from RAM, read back from its files, and put into
fresh caches, as a warm request would. Then the text that follows is scored on it, token by token. Unquantised KV goes
the same way and is the reference, so that quantisation is all that differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from warmkv_evaluation.statistics import Floats, interval
from warmkv_evaluation.windows import cut
from warmkv_server.contract.generation import Job
from warmkv_server.contract.kv import Reuse
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.model import device
from warmkv_server.engine.model import load as models
from warmkv_server.engine.model.discover import discover
from warmkv_server.engine.model.memory_need import MemoryNeed
from warmkv_server.engine.model.step_plan import StepPlan
from warmkv_server.engine.steps.batch import run_chunk
from warmkv_server.engine.steps.sequence import Sequence as Running
from warmkv_server.kv.store import Commit, Durability, Fingerprint, Store
from warmkv_server.text.text import Text

CHUNK = 256


@dataclass(frozen=True)
class Quality:
    """One number of KV bits at one context length, against unquantised KV on the same text.

    Attributes:
        windows: texts scored.
        tokens: scored in all.
        perplexity: on the scored text, given the context.
        change: of the perplexity, as a ratio minus one, with its interval.
        divergence: mean KL divergence of the next-token distribution from the reference's, in nats, with its interval.
        agreement: share of positions where both would choose the same token greedily, with its interval.
        loaded_bytes: read back from the store's files.
    """

    context: int
    bits: int
    windows: int
    tokens: int
    perplexity: float
    change: float
    change_interval: tuple[float, float]
    divergence: float
    divergence_interval: tuple[float, float]
    agreement: float
    agreement_interval: tuple[float, float]
    loaded_bytes: int


async def evaluate(
    spec: str,
    content: str,
    *,
    contexts: Sequence[int],
    bits: Sequence[int],
    group_size: int,
    windows: int,
    scored: int,
) -> AsyncIterator[Quality]:
    """Score every combination; yields each result as it is there.

    Args:
        spec: a model as `--model` takes it.
        content: the text.
        contexts: tokens of context.
        bits: KV bits to compare with unquantised KV.
        windows: texts for each context length.
        scored: tokens scored behind each context.
    """
    device.prepare()
    plain = models.load(spec, adapter=None, codecs=codecs_for(0), context_limit=None)
    text = Text(plain.tokenizer, plain.info.vocab_size)
    for context in contexts:
        texts = cut(text, content, context + scored, windows)
        reference, _ = await _score(plain, texts, context)
        for width in bits:
            quantised = replace(plain, cache_map=discover(plain.runner, codecs_for(width, group_size)))
            logprobs, loaded = await _score(quantised, texts, context)
            yield _compare(context, width, texts, reference, logprobs, loaded)


async def _score(loaded: models.LoadedModel, texts: list[list[int]], context: int) -> tuple[list[mx.array], int]:
    """Log-probabilities, one array (scored, vocabulary) a window, and the bytes read back."""
    found, bytes_loaded = [], 0
    with tempfile.TemporaryDirectory(prefix="warmkv-eval-") as folder:
        settings = Settings(data_dir=Path(folder), durability=Durability.NONE)
        fields = {**loaded.info.fingerprint_fields, **loaded.cache_map.codecs.fingerprint_fields()}
        store = await Store.open(settings, loaded.cache_map.layout, Fingerprint(fields))
        try:
            for tokens in texts:
                reuse = await _round_trip(store, loaded, tokens[:context])
                caches = loaded.cache_map.empty_caches(loaded.model)
                for _ in loaded.cache_map.fill(caches, reuse, room=len(tokens) - context):
                    pass
                logits = loaded.runner.probe(StepPlan.probe(tokens[context:], context), caches)[0].astype(mx.float32)
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                mx.eval(logprobs)
                found.append(logprobs)
                bytes_loaded += reuse.bytes_loaded
        finally:
            await store.close()
    return found, bytes_loaded


async def _round_trip(store: Store, loaded: models.LoadedModel, tokens: list[int]) -> Reuse:
    """Prefill a context, commit it, drop it from RAM, and read it back."""
    running = Running(0, Job(tokens), loaded, MemoryNeed(0, 0, 0))
    for _ in running.open():
        pass
    while running.done < len(tokens):
        run_chunk(running, CHUNK)
    ids = np.array(tokens, dtype=np.int32)
    with store.resolve("", "window", ids, len(tokens)) as lease:
        growth = running.finished().growth
        await store.commit(Commit("", "window", None, ids, Reuse(), growth, lease))
    await store.evict("", "window")
    with store.resolve("", "window", ids, len(tokens)) as lease:
        reuse = await store.load(lease)
    await store.delete("", "window")
    assert reuse.warm_tokens == len(tokens)
    return reuse


def _compare(
    context: int,
    bits: int,
    texts: list[list[int]],
    reference: list[mx.array],
    logprobs: list[mx.array],
    loaded_bytes: int,
) -> Quality:
    loss: list[float] = []
    loss_reference: list[float] = []
    divergence: list[float] = []
    agreement: list[float] = []
    for tokens, expected, found in zip(texts, reference, logprobs, strict=True):
        # Position i of the scored text predicts token i + 1.
        targets = mx.array(tokens[context + 1 :])[:, None]
        expected, found = expected[:-1], found[:-1]
        loss.append(-_mean(mx.take_along_axis(found, targets, axis=-1)))
        loss_reference.append(-_mean(mx.take_along_axis(expected, targets, axis=-1)))
        divergence.append(_mean((mx.exp(expected) * (expected - found)).sum(axis=-1)))
        agreement.append(_mean(mx.argmax(expected, axis=-1) == mx.argmax(found, axis=-1)))
    difference: Floats = np.array(loss) - np.array(loss_reference)
    low, high = interval(difference)
    return Quality(
        context=context,
        bits=bits,
        windows=len(texts),
        tokens=len(texts) * (len(texts[0]) - context - 1),
        perplexity=float(np.exp(np.mean(loss))),
        change=float(np.expm1(difference.mean())),
        change_interval=(float(np.expm1(low)), float(np.expm1(high))),
        divergence=float(np.mean(divergence)),
        divergence_interval=interval(np.array(divergence)),
        agreement=float(np.mean(agreement)),
        agreement_interval=interval(np.array(agreement)),
        loaded_bytes=loaded_bytes,
    )


def _mean(values: mx.array) -> float:
    return float(np.array(values.astype(mx.float32)).mean())
