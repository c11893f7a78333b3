"""What agents are asked, and what they answer. Nothing here knows how it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from warmkv_server.agents.stages import Stages
from warmkv_server.contract.calls import CallFinished
from warmkv_server.contract.content import AS_IT_LIKES, Content, ToolChoice
from warmkv_server.contract.generation import Answer, Delta, Finish, Scored
from warmkv_server.contract.kv import BLOCK_TOKENS, Fallback, Reuse, Source
from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.store import AgentRecord


@dataclass(frozen=True)
class Identity:
    """What makes a retry recognisable: the client's id for the request, and a digest of all that it asks for."""

    request_id: str
    body_hash: bytes


class Activity(StrEnum):
    IDLE = "idle"
    QUEUED = "queued"
    LOADING = "loading"
    PREFILLING = "prefilling"
    DECODING = "decoding"


class Doing(NamedTuple):
    """What is being done for an agent, and how far it is, in tokens."""

    activity: Activity = Activity.IDLE
    done: int = 0
    total: int = 0


IDLE = Doing()


@dataclass(frozen=True)
class AgentView:
    """An agent as of its last commit, and what is being done for it now."""

    record: AgentRecord
    doing: Doing = IDLE


@dataclass(frozen=True)
class PrimeRequest:
    """Make content the context, or append it: Prime and Extend.

    Attributes:
        append: whether the content goes behind the held context, which must exist then.
        generation_prompt: whether a chat gets it, for an answer that comes later.
        pinned, ttl, labels: new values; None leaves them as they are. `ttl` in seconds.
        stages: what it goes through.
    """

    key: AgentKey
    content: Content | None
    append: bool = False
    generation_prompt: bool = False
    pinned: bool | None = None
    ttl: float | None = None
    labels: Mapping[str, str] | None = None
    expected_revision: int | None = None
    identity: Identity | None = None
    stages: Stages = field(default_factory=Stages)


@dataclass(frozen=True)
class GenerateRequest:
    """Generate an answer.

    Attributes:
        replace: whether the content is the whole context rather than new at its end.
        splice: whether held tokens take the place of the content's that say the same, where the content is the whole
            context; None for a chat's alone.
        whole: whether the answer is to be sent as one delta.
        ephemeral: change nothing.
        told_apart: whether reasoning and tool calls are told apart from the text.
        choice: what the model may call.
        drops_reasoning: whether the next user's message drops this answer's reasoning.
        candidates: answers to sample; 0 for the one of the agent itself.
        candidate_ids: agents to make of them.
    """

    key: AgentKey
    content: Content | None
    answer: Answer
    replace: bool = False
    splice: bool | None = None
    whole: bool = False
    ephemeral: bool = False
    told_apart: bool = False
    choice: ToolChoice = AS_IT_LIKES
    drops_reasoning: bool = False
    candidates: int = 0
    candidate_ids: tuple[str, ...] = ()
    expected_revision: int | None = None
    identity: Identity | None = None
    stages: Stages = field(default_factory=Stages)


@dataclass(frozen=True)
class ScoreRequest:
    """Tell how probable content is, and keep nothing.

    Attributes:
        top: likeliest alternatives of each token.
    """

    key: AgentKey
    content: Content | None
    top: int = 0
    stages: Stages = field(default_factory=Stages)


@dataclass(frozen=True)
class CacheReport:
    """What was reused and what was computed. cached + prefilled = prompt; hot + warm + shared = cached.

    Attributes:
        held_tokens: of the agent's context when the request's turn came.
        spliced_tokens: tokens of the prompt that took the place of others that say the same.
    """

    source: Source
    prompt_tokens: int
    hot_tokens: int = 0
    warm_tokens: int = 0
    shared_tokens: int = 0
    bytes_loaded: int = 0
    fallback: Fallback | None = None
    held_tokens: int = 0
    spliced_tokens: int = 0

    @classmethod
    def of(cls, reuse: Reuse, prompt_tokens: int, held_tokens: int = 0, spliced_tokens: int = 0) -> CacheReport:
        source = reuse.source
        # The one token that all contexts begin with, say, saves nothing worth a name.
        if source is Source.SHARED and reuse.shared_tokens < min(BLOCK_TOKENS, prompt_tokens / 4):
            source = Source.COLD
        return cls(
            source,
            prompt_tokens,
            reuse.hot_tokens,
            reuse.warm_tokens,
            reuse.shared_tokens,
            reuse.bytes_loaded,
            reuse.fallback,
            held_tokens,
            spliced_tokens,
        )

    @property
    def cached_tokens(self) -> int:
        return self.hot_tokens + self.warm_tokens + self.shared_tokens

    @property
    def prefilled_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass
class Timings:
    """Seconds. What did not happen stays zero."""

    queue: float = 0.0
    load: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0
    commit: float = 0.0


@dataclass(frozen=True)
class PrimeResult:
    agent: AgentView
    cache: CacheReport
    timings: Timings
    persisted: bool


@dataclass(frozen=True)
class GenerateStarted:
    """The reusable KV is in place; the rest of the prompt is computed now."""

    agent_id: str
    cache: CacheReport


@dataclass(frozen=True)
class PrefillProgress:
    """Tokens computed, out of those that have to be."""

    done: int
    total: int


@dataclass(frozen=True)
class GenerateFinished:
    """The last event of an answer.

    Attributes:
        agent: after the commit; None if there is none.
        reasoning_tokens: of completion_tokens.
    """

    finish: Finish
    matched_stop: str
    completion_tokens: int
    cache: CacheReport
    timings: Timings
    agent: AgentView | None
    persisted: bool
    calls: tuple[CallFinished, ...] = ()
    reasoning_tokens: int = 0
    forced_tokens: int = 0
    candidates: tuple[CandidateFinished, ...] = ()


@dataclass(frozen=True)
class CandidateDelta:
    """More of one of several answers."""

    candidate: int
    delta: Delta


@dataclass(frozen=True)
class CandidateFinished:
    """How one of several answers ended.

    Attributes:
        agent: that was made of it, if one was.
    """

    finish: Finish
    matched_stop: str
    completion_tokens: int
    logprob_sum: float
    agent: AgentView | None
    calls: tuple[CallFinished, ...] = ()


@dataclass(frozen=True)
class ScoreFinished:
    """The last event of a score."""

    logprob_sum: float
    cache: CacheReport
    timings: Timings


ScoreEvent = Scored | ScoreFinished


@dataclass(frozen=True)
class Recorded:
    """What was sent before, under the same request id. Only the service, which sends it again, knows what it says."""

    message: Any


GenerateEvent = GenerateStarted | PrefillProgress | Delta | CandidateDelta | GenerateFinished | Recorded


@dataclass(frozen=True)
class EvictResult:
    """Bytes; residency in the OS page cache is -1 where it can't be known."""

    agent: AgentView
    bytes_freed: int
    resident_before: int
    resident_after: int


@dataclass(frozen=True)
class AgentPage:
    """One page of agents, and where the next begins; empty on the last."""

    agents: tuple[AgentView, ...]
    next_after: str
