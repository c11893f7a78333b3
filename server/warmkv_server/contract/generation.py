"""What the engine is asked to do, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from warmkv_server.contract.calls import CallNews
from warmkv_server.contract.grammar import Grammar
from warmkv_server.contract.kv import Growth, Reuse


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults choose greedily and change no logit."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What to generate once the prompt's KV is there.

    Attributes:
        max_tokens: at least 1.
        stop: strings that end the answer and are not part of it.
        stop_tokens: tokens that end the answer as an end of sequence does, whatever `ignore_eos` says.
        ignore_eos: go on after an end-of-sequence token.
        top_logprobs: alternatives reported for each token; 0 reports no logprobs at all.
        grammar: what its text must be a sentence of.
    """

    sampling: Sampling = Sampling()
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    top_logprobs: int = 0
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Score:
    """Tell the log probability of each token from `first` on, which is at least 1, with `top` alternatives."""

    first: int
    top: int = 0


@dataclass(frozen=True)
class Job:
    """One sequence to run.

    Attributes:
        tokens: the whole context, reused part included. At least one.
        reuse: the loaded prefix; at most len(tokens) tokens, at most len(tokens) - 1 when there is an answer.
        answer: None prefills only.
        snapshot_at: context lengths after which state that can't be cut is captured, besides the end.
        tenant: takes turns with others where jobs wait.
        prefix: KV that was computed before behind the reused part, for this prompt and for others; of fewer tokens than
            the prompt has. It counts as this job's own growth.
        score: what is to be told of the tokens themselves; there is no answer then, and no growth.
    """

    tokens: Sequence[int]
    reuse: Reuse = field(default_factory=Reuse)
    answer: Answer | None = None
    snapshot_at: frozenset[int] = frozenset()
    tenant: str = ""
    score: Score | None = None
    prefix: Growth | None = None


class Finish(StrEnum):
    STOP = "stop"
    """An end-of-sequence token, or one that the request names, was sampled; it is part of the tokens."""
    LENGTH = "length"
    """`max_tokens`, or the model's last position, was reached."""
    STOP_SEQUENCE = "stop_sequence"
    """A stop string was produced."""
    PREFILLED = "prefilled"
    """There was no answer to generate."""
    CANCELLED = "cancelled"
    """`Handle.cancel` was called."""
    TOO_COMPLEX = "too_complex"
    """Its grammar took too much for the next token."""


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one sampled token and of the `top` likeliest, likeliest first: the model's own, before
    penalties, bias and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Started:
    """The sequence left the queue; its prefill begins now."""

    queued_seconds: float


@dataclass(frozen=True)
class Progress:
    """Tokens of the context whose KV is there (reused ones included), out of all of the prompt's."""

    done: int
    total: int


@dataclass(frozen=True)
class Delta:
    """New tokens, and the text that became certain with them, which may be empty.

    Attributes:
        reasoning, calls: told apart from the text where the answer is read as a message.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...] = ()
    reasoning: str = ""
    calls: tuple[CallNews, ...] = ()


@dataclass(frozen=True, eq=False)
class Scored:
    """Log probabilities of the next tokens of the prompt, the model's own.

    Attributes:
        token_ids: (tokens,).
        logprobs: (tokens,); minus infinity for an id that no text has.
        top_ids, top: the likeliest, (tokens, alternatives), likeliest first.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Finished:
    """The last event of a job that didn't fail.

    Attributes:
        completion: every token of the answer that belongs to the context, end-of-sequence included, tokens behind
            a stop string not.
        growth: the KV from the reused prefix to the end of prompt + completion. After a cancel during prefill it
            covers what was computed, with an empty completion: it is the caller's to drop.
        forced: tokens of the completion that the grammar left no choice of, and that no step was spent on.
    """

    finish: Finish
    completion: tuple[int, ...]
    growth: Growth
    matched_stop: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    forced: int = 0


Event = Started | Progress | Scored | Delta | Finished


@dataclass(frozen=True)
class EngineStats:
    """Gauges and counters of the engine. Each is whole; together they may be a step apart."""

    queue_depth: int
    prefilling: int
    decoding: int
    batch_size: int
    """Rows in the last decode step."""
    prefilled_tokens: int
    decoded_tokens: int
    proposed_tokens: int
    """Guessed from the context and checked."""
    accepted_tokens: int
    """Guessed right."""
    in_flight_bytes: int
    """That running sequences may take, with all that is computed for them, and that those hold that gave way."""
    preempted: int
    """Sequences that gave way to another tenant's; one may have more than once."""
