"""Perplexity, divergence, agreement and recall of coded KV, after a round trip through the real store.

For each window of text the context is prefilled, committed, dropped from RAM, read back from its files, and put into
fresh caches, as a warm request would. Then the text that follows is scored on it, token by token. Unquantised KV goes
the same way and is the reference, so that how KV is coded is all that differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from warmkv_evaluation import recall
from warmkv_evaluation.statistics import Floats, interval
from warmkv_evaluation.windows import cut
from warmkv_server.contract.generation import Job
from warmkv_server.contract.kv import PartKind, Reuse
from warmkv_server.contract.kv_choice import KvChoice
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.cache.codecs.choose import codecs_chosen, codecs_for
from warmkv_server.engine.model import device
from warmkv_server.engine.model import load as models
from warmkv_server.engine.model.memory_need import MemoryNeed
from warmkv_server.engine.model.step_plan import StepPlan
from warmkv_server.engine.steps.batch import run_chunk
from warmkv_server.engine.steps.sequence import Sequence as Running
from warmkv_server.errors import OperatorError
from warmkv_server.kv.store import Commit, Durability, Fingerprint, Store
from warmkv_server.text.text import Text

CHUNK = 256


@dataclass(frozen=True)
class Estimate:
    """A mean over windows, with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        return cls(float(np.mean(values)), *interval(np.array(values)))


@dataclass(frozen=True)
class Quality:
    """One way of coding KV at one context length, against unquantised KV on the same text.

    Attributes:
        kv: as `--kv` takes it.
        bits: of a value, all in: what was read from the store's files, by the values that it stands for.
        windows: texts scored.
        tokens: scored in all.
        perplexity: on the scored text, given the context.
        change: of the perplexity, as a ratio minus one.
        divergence: mean KL divergence of the next-token distribution from the reference's, in nats.
        median_divergence, p99_divergence: over all scored tokens, in nats.
        agreement: share of positions where both would choose the same token greedily.
        recalled: right answers, as a share of those of unquantised KV; None if that has none.
        asked, right_unquantised: questions, and those that unquantised KV answers right.
        loaded_bytes: read back from the store's files.
    """

    context: int
    kv: str
    bits: float
    windows: int
    tokens: int
    perplexity: float
    change: Estimate
    divergence: Estimate
    median_divergence: float
    p99_divergence: float
    agreement: Estimate
    recalled: float | None
    asked: int
    right_unquantised: int
    loaded_bytes: int


@dataclass(frozen=True)
class _Scores:
    """Log-probabilities of a text, (scored, vocabulary), for each window; and what was read back."""

    logprobs: list[mx.array]
    bytes_loaded: int


async def evaluate(
    spec: str,
    content: str,
    *,
    contexts: Sequence[int],
    kv: Sequence[str],
    group_size: int,
    windows: int,
    scored: int,
    asked: int = 0,
) -> AsyncIterator[Quality]:
    """Score every combination; yields each result as it is there.

    Args:
        spec: a model as `--model` takes it.
        content: the text.
        contexts: tokens of context.
        kv: ways of coding to compare with unquantised KV, as `--kv` takes them.
        windows: texts for each context length.
        scored: tokens scored behind each context.
        asked: contexts with facts that are asked for behind them, for each context length; 0 for none.

    Raises:
        OperatorError: if there is no such way of coding.
    """
    device.prepare()
    plans = {name: codecs_chosen(_choice(name), group_size) for name in kv}
    plain = models.load(spec, adapter=None, codecs=codecs_for(0), context_limit=None)
    coded = {name: models.recoded(plain, plan) for name, plan in plans.items()}
    text = Text(plain.tokenizer, plain.info.vocab_size)
    for context in contexts:
        texts = cut(text, content, context + scored, windows)
        quizzes = recall.quizzes(text, content, context, asked)
        reference = await _score(plain, texts, context)
        known = await _right(plain, quizzes)
        for name, loaded in coded.items():
            found = await _score(loaded, texts, context)
            right = await _right(loaded, quizzes)
            yield _compare(context, name, loaded, texts, reference, found, known, right)


def _choice(kv: str) -> KvChoice:
    try:
        return KvChoice.read(kv)
    except ValueError as error:
        raise OperatorError(f"--kv can't be {kv!r}: {error}") from None


async def _score(loaded: models.LoadedModel, texts: list[list[int]], context: int) -> _Scores:
    found: list[mx.array] = []
    read = 0
    async for logprobs, bytes_loaded in _behind(loaded, [(tokens[:context], tokens[context:]) for tokens in texts]):
        found.append(logprobs)
        read += bytes_loaded
    return _Scores(found, read)


async def _right(loaded: models.LoadedModel, quizzes: list[recall.Quiz]) -> list[bool]:
    """Of each question, whether every token of its answer is the likeliest behind those before it."""
    right: list[bool] = []
    pairs = [(quiz.context, quiz.questions) for quiz in quizzes]
    numbers = iter(quizzes)
    async for logprobs, _ in _behind(loaded, pairs):
        quiz = next(numbers)
        best = np.array(mx.argmax(logprobs, axis=-1))
        for start, end in quiz.answers:
            right.append(best[start - 1 : end - 1].tolist() == quiz.questions[start:end])
    return right


async def _behind(
    loaded: models.LoadedModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> AsyncIterator[tuple[mx.array, int]]:
    """Log-probabilities of what follows each context, (tokens, vocabulary), and the bytes read back."""
    with tempfile.TemporaryDirectory(prefix="warmkv-eval-") as folder:
        settings = Settings(data_dir=Path(folder), durability=Durability.NONE)
        fields = {**loaded.info.fingerprint_fields, **loaded.cache_map.codecs.fingerprint_fields()}
        store = await Store.open(settings, loaded.cache_map.layout, Fingerprint(fields))
        try:
            for context, behind in pairs:
                reuse = await _round_trip(store, loaded, context)
                caches = loaded.cache_map.empty_caches(loaded.model)
                for _ in loaded.cache_map.fill(caches, reuse, room=len(behind)):
                    pass
                logits = loaded.runner.probe(StepPlan.probe(behind, len(context)), caches)[0].astype(mx.float32)
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                mx.eval(logprobs)
                yield logprobs, reuse.bytes_loaded
        finally:
            await store.close()


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
    kv: str,
    loaded: models.LoadedModel,
    texts: list[list[int]],
    reference: _Scores,
    coded: _Scores,
    known: list[bool],
    right: list[bool],
) -> Quality:
    loss: list[float] = []
    difference: list[float] = []
    divergence: list[Floats] = []
    agreement: list[float] = []
    for tokens, expected, found in zip(texts, reference.logprobs, coded.logprobs, strict=True):
        # Position i of the scored text predicts token i + 1.
        targets = mx.array(tokens[context + 1 :])[:, None]
        expected, found = expected[:-1], found[:-1]
        loss.append(-_mean(mx.take_along_axis(found, targets, axis=-1)))
        difference.append(loss[-1] + _mean(mx.take_along_axis(expected, targets, axis=-1)))
        divergence.append(np.array((mx.exp(expected) * (expected - found)).sum(axis=-1), dtype=np.float64))
        agreement.append(_mean(mx.argmax(expected, axis=-1) == mx.argmax(found, axis=-1)))
    every = np.concatenate(divergence)
    change = Estimate.of(difference)
    values = len(texts) * context * _values_of_a_token(loaded)
    return Quality(
        context=context,
        kv=kv,
        bits=coded.bytes_loaded * 8 / values if values else 0.0,
        windows=len(texts),
        tokens=len(every),
        perplexity=float(np.exp(np.mean(loss))),
        change=Estimate(*(float(np.expm1(each)) for each in (change.value, change.low, change.high))),
        divergence=Estimate.of([float(each.mean()) for each in divergence]),
        median_divergence=float(np.median(every)),
        p99_divergence=float(np.percentile(every, 99)),
        agreement=Estimate.of(agreement),
        recalled=sum(right) / sum(known) if sum(known) else None,
        asked=len(known),
        right_unquantised=sum(known),
        loaded_bytes=coded.bytes_loaded,
    )


def _values_of_a_token(loaded: models.LoadedModel) -> int:
    """In layers that keep every token."""
    return sum(
        len(stack.streams) * stack.heads * stack.head_dim
        for stack in loaded.cache_map.stacks
        if stack.kind == PartKind.APPEND
    )


def _mean(values: mx.array) -> float:
    return float(np.array(values.astype(mx.float32)).mean())
