"""The way through store and engine that Prime, Extend and Generate share: find, load, compute, commit."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from warmkv_server.agents.admission import Admission
from warmkv_server.agents.context import Context
from warmkv_server.agents.run import Run
from warmkv_server.agents.stages import Stage, Stages
from warmkv_server.agents.turns import Turns
from warmkv_server.agents.types import Activity, CacheReport, Doing, Timings
from warmkv_server.contract.generation import Answer, Delta, Event, Finished, Job, Progress, Score, Started
from warmkv_server.contract.kv import Reuse, inner_boundaries
from warmkv_server.contract.names import AgentKey
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.output.constraint import Constraint
from warmkv_server.kv.store import AgentRecord, Commit, Committed, Lease, OutcomeOf, RequestOutcome, Store, TokenIds


@dataclass
class Tally:
    """Sums over finished requests since the server started.

    Attributes:
        requests, answers: by source; answers are the requests that had a first token.
        first_token: seconds that those took to it, by source.
        anonymous_tokens: of those reused, what requests without an agent had of others without one.
    """

    requests: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    first_token: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    fallbacks: Counter[str] = field(default_factory=Counter)
    hot_tokens: int = 0
    warm_tokens: int = 0
    shared_tokens: int = 0
    prefilled_tokens: int = 0
    anonymous_tokens: int = 0
    spliced_tokens: int = 0

    def add(self, cache: CacheReport, first_token: float, *, anonymous: bool) -> None:
        self.requests[cache.source] += 1
        if first_token:
            self.answers[cache.source] += 1
            self.first_token[cache.source] += first_token
        if cache.fallback is not None:
            self.fallbacks[cache.fallback] += 1
        self.hot_tokens += cache.hot_tokens
        self.warm_tokens += cache.warm_tokens
        self.shared_tokens += cache.shared_tokens
        self.prefilled_tokens += cache.prefilled_tokens
        self.spliced_tokens += cache.spliced_tokens
        if anonymous:
            self.anonymous_tokens += cache.hot_tokens + cache.warm_tokens


class Tallies:
    """A tally of each tenant, and one of all."""

    def __init__(self) -> None:
        self.total = Tally()
        self.by_tenant: defaultdict[str, Tally] = defaultdict(Tally)

    def add(self, key: AgentKey, cache: CacheReport, first_token: float = 0.0) -> None:
        """
        Args:
            first_token: seconds to it; 0 if there was none.
        """
        for tally in (self.total, self.by_tenant[key.tenant]):
            tally.add(cache, first_token, anonymous=not key.agent_id)

    def of(self, tenant: str) -> Tally:
        return self.by_tenant[tenant]


@dataclass(frozen=True)
class Tools:
    """What the use cases work with.

    Attributes:
        keep_anonymous: seconds that the context of a request without an agent is kept; None for not at all.
    """

    engine: Engine
    store: Store
    turns: Turns
    admission: Admission
    tallies: Tallies
    synced: bool
    keep_anonymous: float | None = None


@dataclass
class Computation:
    """One context on its way: what was reused for it, what is computed, and what gets committed.

    Made at the agent's turn; its lease is released by whoever made it.

    Attributes:
        constraint: on the answer.
        score: what to tell of the context's own tokens, instead of an answer.
    """

    tools: Tools
    key: AgentKey
    run: Run[Any]
    context: Context
    timings: Timings
    stages: Stages
    lease: Lease
    constraint: Constraint | None = None
    score: Score | None = None
    reuse: Reuse = field(default_factory=Reuse)

    @property
    def cache(self) -> CacheReport:
        held = self.context.agent.token_count if self.context.agent is not None else 0
        return CacheReport.of(self.reuse, len(self.context.tokens), held, self.context.spliced)

    @asynccontextmanager
    async def loaded(self, answer: Answer | None) -> AsyncIterator[None]:
        """Have the reusable prefix in RAM for the block; less of it if a file is bad or slow.

        Raises:
            MemoryBudget: at once, if what is to be computed could never run.
            QueueFull: if too many wait to load.
        """
        tokens, reused = len(self.context.tokens), self.lease.length
        if answer is not None or reused < tokens:
            self.tools.engine.check_fits(tokens, reused, answer.max_tokens if answer is not None else 0)
        began = time.perf_counter()
        self.stages.enter(Stage.QUEUE)
        held_bytes = self.lease.length * self.tools.engine.info.kv_bytes_per_token
        async with self.tools.admission.hold(held_bytes, self.key.tenant):
            self.timings.queue += time.perf_counter() - began
            self.run.doing = Doing(Activity.LOADING, 0, self.lease.length)
            self.stages.enter(Stage.LOAD)
            self.reuse = await self.tools.store.load(self.lease)
            self.stages.enter(None)
            self.timings.load = self.reuse.seconds
            yield

    async def compute(self, answer: Answer | None, notify: Callable[[Event], None]) -> Finished:
        """Run the engine over what is not there yet, and over the answer.

        Returns when the engine is done with it, also after it was told to stop: then with Finish.CANCELLED.
        """
        tokens: list[int] = self.context.tokens.tolist()
        snapshot_at: frozenset[int] = frozenset()
        if self.tools.engine.info.layout.has_state and self.score is None:
            snapshot_at = inner_boundaries(len(tokens))
            if answer is None:  # So that the same content again replays one token; an answer stops there anyway.
                snapshot_at |= {len(tokens) - 1}
        handle = self.tools.engine.submit(
            Job(tokens, self.reuse, answer, snapshot_at, self.key.tenant, self.score), self.constraint
        )
        self.run.doing = Doing(Activity.QUEUED)
        self.stages.enter(Stage.QUEUE)
        try:
            with self.run.interrupted_by(handle.cancel):
                async for event in handle:
                    self._follow(event, answer)
                    notify(event)
                    if isinstance(event, Finished):
                        return event
        finally:
            handle.cancel()
        raise AssertionError("the engine's events end with Finished")

    async def commit(
        self,
        completion: tuple[int, ...],
        finished: Finished | None,
        outcome_of: OutcomeOf | None,
        changes: Mapping[str, Any],
        ending: str,
    ) -> Committed:
        """Make it the agent's context. Nothing interrupts this.

        Args:
            completion: tokens of the answer, behind the prompt.
            finished: what the engine computed; None if everything was there.
            outcome_of: makes the record of a request that has an id, when everything but the transaction is done.
            changes: of `pinned`, `ttl`, `labels`.
            ending: what the context ends with, and what goes on with it.
        """
        tokens: TokenIds = np.concatenate([self.context.tokens, np.asarray(completion, np.int32)])
        began = time.perf_counter()
        self.stages.enter(Stage.COMMIT)

        def timed(agent: AgentRecord, persisted: bool) -> RequestOutcome:
            assert outcome_of is not None
            self.timings.commit = time.perf_counter() - began
            return outcome_of(agent, persisted and self.tools.synced)

        with self.run.uninterrupted():
            committed = await self.tools.store.commit(
                Commit(
                    tenant=self.key.tenant,
                    agent_id=self.key.agent_id,
                    incarnation=self.context.incarnation,
                    tokens=tokens,
                    reuse=self.reuse,
                    growth=finished.growth if finished is not None else None,
                    lease=self.lease,
                    ending=ending,
                    keep_boundaries=frozenset({len(self.context.tokens) - 1, len(tokens)}),
                    request=timed if outcome_of is not None else None,
                    **changes,
                )
            )
        if outcome_of is None:
            self.timings.commit = committed.seconds
        self.stages.enter(None)
        return replace(committed, persisted=committed.persisted and self.tools.synced)

    def _follow(self, event: Event, answer: Answer | None) -> None:
        match event:
            case Started(queued_seconds):
                self.timings.queue += queued_seconds
                self.stages.enter(Stage.PREFILL)
                self.run.doing = Doing(Activity.PREFILLING, 0, self.cache.prefilled_tokens)
            case Progress(done, total):
                reused = self.reuse.length
                self.run.doing = Doing(Activity.PREFILLING, done - reused, total - reused)
            case Delta(token_ids):
                before = self.run.doing.done if self.run.doing.activity is Activity.DECODING else 0
                if not before:
                    self.stages.enter(Stage.DECODE)
                most = answer.max_tokens if answer is not None else 0
                self.run.doing = Doing(Activity.DECODING, before + len(token_ids), most)
            case Finished():
                self.timings.prefill = event.prefill_seconds
                self.timings.decode = event.decode_seconds
                self.stages.enter(None)


@asynccontextmanager
async def turns(
    tools: Tools, stages: Stages, run: Run[Any], *keys: AgentKey, makes: bool = False
) -> AsyncIterator[Timings]:
    """Wait for the turns of these agents and hold them for the block; the timings until then.

    Args:
        makes: whether the run makes the agent where there is none; see Turns.
    """
    stages.enter(Stage.QUEUE)
    async with AsyncExitStack() as held:
        for key in sorted(set(keys)):  # all in one order, so that nobody waits in a circle
            await held.enter_async_context(tools.turns.take(key, run, makes=makes))
        stages.enter(None)
        yield Timings(queue=time.perf_counter() - stages.arrived)
