"""Every sampling parameter does what it says, by the numbers, alone and in a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import FolderOf
from tests.engine.families import VOCAB
from tests.engine.runs import Solo, job_of, outcome, outcomes, prompt_of, running
from warmkv_server.contract.generation import Sampling
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.output.sampling import Choice, Chooser

Floats = npt.NDArray[np.float64]

SIZE = 24
"""Of the vocabulary of these logits."""

LOGITS = np.sin(np.arange(SIZE) * 2.4) * 1.5


def choose(sampling: Sampling, count: int, logits: Floats = LOGITS, prompt: Sequence[int] = (1,)) -> list[int]:
    """Draw at `count` positions from the same logits."""
    chooser = Chooser(sampling, prompt, SIZE, 0)
    row = mx.array(logits[None], dtype=mx.float32)
    return [chooser.choose(row, position, None).read() for position in range(1, count + 1)]


def probabilities(logits: Floats) -> Floats:
    powers: Floats = np.exp(logits - logits.max())
    normalised: Floats = powers / powers.sum()
    return normalised


def kept(probs: Floats, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> set[int]:
    """The tokens that the filters leave, each from its definition."""
    ranked = np.argsort(-probs)
    nucleus = {int(token) for n, token in enumerate(ranked) if probs[ranked[:n]].sum() < top_p}
    best = {int(token) for token in (ranked[:top_k] if top_k else ranked)}
    likely = {int(token) for token in ranked if probs[token] >= min_p * probs.max()}
    return nucleus & best & likely


def test_greedy_takes_the_largest_logit() -> None:
    assert set(choose(Sampling(), 5)) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_temperature(temperature: float) -> None:
    """Pearson's test over 1,500 draws; the seed is fixed, so it passes always or never."""
    count = 1500
    drawn = Counter(choose(Sampling(temperature=temperature, seed=7), count))
    expected = probabilities(LOGITS / temperature) * count
    enough = expected >= 5
    statistic = sum((drawn[int(token)] - expected[token]) ** 2 / expected[token] for token in np.flatnonzero(enough))
    rest = expected[~enough].sum()
    degrees = int(enough.sum())
    assert abs(sum(drawn[int(token)] for token in np.flatnonzero(~enough)) - rest) <= 5 * max(rest, 1.0) ** 0.5
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 6},
        {"top_k": SIZE},
        {"top_k": 10 * SIZE},
        {"top_p": 0.05},
        {"top_p": 0.6},
        {"min_p": 0.4},
        {"min_p": 1.0},
        {"top_p": 0.8, "top_k": 9, "min_p": 0.3},
    ],
)
def test_filters_leave_the_tokens_that_they_should(filters: dict[str, float]) -> None:
    drawn = set(choose(Sampling(temperature=1.0, seed=3, **filters), 200))  # type: ignore[arg-type]
    allowed = kept(probabilities(LOGITS), **filters)  # type: ignore[arg-type]
    assert drawn <= allowed
    likely = {token for token in allowed if probabilities(LOGITS)[token] > 0.04}
    assert drawn >= likely


def adjusted(logits: Floats, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Floats:
    """Bias and penalties, each from its definition."""
    out = logits.copy()
    for token, bias in sampling.logit_bias.items():
        out[token] += bias
    for token in {*prompt, *answer}:
        out[token] *= sampling.repetition_penalty if out[token] < 0 else 1 / sampling.repetition_penalty
    for token, times in Counter(answer).items():
        out[token] -= sampling.presence_penalty + times * sampling.frequency_penalty
    return out


@settings(deadline=None, max_examples=60)
@given(
    sampling=st.builds(
        Sampling,
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
        presence_penalty=st.sampled_from([0.0, 0.7, -0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.4, -0.2]),
        logit_bias=st.dictionaries(st.integers(0, SIZE - 1), st.sampled_from([-100.0, -1.0, 0.5, 3.0]), max_size=4),
    ),
    prompt=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30),
    answer=st.lists(st.integers(0, SIZE - 1), max_size=10),
)
def test_bias_and_penalties_by_their_definitions(sampling: Sampling, prompt: list[int], answer: list[int]) -> None:
    """Repetition looks at prompt and answer, presence and frequency at the answer; all of it, however long."""
    chooser = Chooser(sampling, prompt, SIZE, SIZE)
    choice: Choice | None = None
    for position, last in enumerate([None, *answer]):
        row = mx.array(LOGITS[None], dtype=mx.float32)
        choice = chooser.choose(row, len(prompt) + position, None if last is None else mx.array([last]))
    assert choice is not None
    wanted = adjusted(LOGITS, sampling, prompt, answer)
    assert wanted[choice.read()] == pytest.approx(wanted.max(), abs=1e-4)
    reported = choice.logprobs()
    assert reported is not None
    own = np.log(probabilities(LOGITS))
    for token, logprob in reported.top:
        assert logprob == pytest.approx(own[token], abs=1e-5), "what is reported is the model's own distribution"


@pytest.mark.parametrize("top", [1, 5, SIZE])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_likeliest_in_order_and_of_the_token_itself(top: int, temperature: float) -> None:
    chooser = Chooser(Sampling(temperature=temperature, top_k=3, seed=5), [1], SIZE, top)
    reported = chooser.choose(mx.array(LOGITS[None], dtype=mx.float32), 1, None).logprobs()
    assert reported is not None
    expected = np.log(probabilities(LOGITS))
    assert [token for token, _ in reported.top] == list(np.argsort(-expected)[:top])
    assert [logprob for _, logprob in reported.top] == pytest.approx(np.sort(expected)[::-1][:top], abs=1e-5)
    assert reported.logprob == pytest.approx(expected[reported.token_id], abs=1e-5)
    if top == SIZE:
        assert np.exp([logprob for _, logprob in reported.top]).sum() == pytest.approx(1, abs=1e-5)


def test_equal_logits_are_reported_by_token() -> None:
    reported = Chooser(Sampling(), [1], SIZE, SIZE).choose(mx.zeros((1, SIZE)), 1, None).logprobs()
    assert reported is not None
    assert [token for token, _ in reported.top] == list(range(SIZE))


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_a_seed_gives_the_same_draws_and_another_seed_others(seed: int) -> None:
    hot = Sampling(temperature=3.0, seed=seed)
    assert choose(hot, 20) == choose(hot, 20)
    other = Sampling(temperature=3.0, seed=(seed + 1) % 2**64)
    assert choose(hot, 20) != choose(other, 20)
    assert len(set(choose(hot, 20))) > 5, "every position must draw anew"


def test_without_a_seed_every_sequence_draws_its_own() -> None:
    hot = Sampling(temperature=3.0)
    assert choose(hot, 20) != choose(hot, 20)


def test_draws_of_one_sequence_leave_those_of_others_alone() -> None:
    row = mx.array(LOGITS[None], dtype=mx.float32)
    both = [Chooser(Sampling(temperature=3.0, seed=seed), [1], SIZE, 0) for seed in (1, 2)]
    mixed = [[chooser.choose(row, position, None).read() for chooser in both] for position in range(1, 11)]
    for seed, drawn in zip((1, 2), zip(*mixed, strict=True), strict=True):
        assert list(drawn) == choose(Sampling(temperature=3.0, seed=seed), 10)


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.5, seed=1),
    Sampling(temperature=1.5, seed=2),
    Sampling(temperature=0.7, top_p=0.9, seed=3),
    Sampling(temperature=2.0, top_k=4, seed=4),
    Sampling(temperature=2.0, min_p=0.3, seed=5),
    Sampling(repetition_penalty=1.5),
    Sampling(presence_penalty=2.0),
    Sampling(frequency_penalty=0.5),
    Sampling(logit_bias={20: 1.5, 21: -100.0}),
]
"""One for each parameter; each changes the answer to PROMPT."""

PROMPT = prompt_of(40)
ANSWER = 12


def alone(solo: Solo, sampling: Sampling) -> list[int]:
    """The answer by the same choices over logits of a run alone."""
    logits, caches, _ = solo.context(PROMPT)
    chooser = Chooser(sampling, PROMPT, VOCAB, 0)
    tokens: list[int] = []
    while len(tokens) < ANSWER:
        last = mx.array(tokens[-1:]) if tokens else None
        tokens.append(chooser.choose(logits[None], len(PROMPT) + len(tokens), last).read())
        logits = solo.loaded.model(mx.array([tokens[-1:]]), cache=caches)[0, -1]
    return tokens


async def test_each_parameter_in_a_batch_and_alone(folder_of: FolderOf) -> None:
    """Without quantisation, so that a batch and a run alone differ by rounding only."""
    solo = Solo(folder_of("llama"), codecs_for(0))
    jobs = [job_of(PROMPT, ANSWER, sampling=sampling) for sampling in SAMPLINGS]
    async with running(folder_of("llama"), kv_bits=0) as engine:
        together = await outcomes(engine, jobs)
        for job, sampling, got in zip(jobs, SAMPLINGS, together, strict=True):
            assert got.tokens == alone(solo, sampling)
            assert got.tokens == (await outcome(engine.submit(job))).tokens
    greedy = together[0].tokens
    assert all(got.tokens != greedy for got in together[1:]), "a parameter must change something to show anything"
    assert 21 not in together[-1].tokens


async def test_logprobs_do_not_change_the_tokens(folder_of: FolderOf) -> None:
    async with running(folder_of("llama")) as engine:
        for sampling in SAMPLINGS:
            plain = await outcome(engine.submit(job_of(PROMPT, ANSWER, sampling=sampling)))
            reporting = await outcome(engine.submit(job_of(PROMPT, ANSWER, sampling=sampling, top_logprobs=3)))
            assert reporting.tokens == plain.tokens
            assert not plain.logprobs
            assert [each.token_id for each in reporting.logprobs] == reporting.tokens
            assert all(len(each.top) == 3 for each in reporting.logprobs)
