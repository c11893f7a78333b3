"""The door to the use cases: one method for each thing a client can ask for."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from warmkv_server.agents import candidates, generate, manage, prime, score
from warmkv_server.agents.admission import Admission
from warmkv_server.agents.answer_log import AnswerEvents
from warmkv_server.agents.candidate_log import CandidateEvents
from warmkv_server.agents.compute import Tallies, Tools
from warmkv_server.agents.context import count
from warmkv_server.agents.idempotency import Requests, ResponseCodecs
from warmkv_server.agents.run import Events, Run
from warmkv_server.agents.turns import Turns
from warmkv_server.agents.types import (
    AgentPage,
    AgentView,
    EvictResult,
    GenerateEvent,
    GenerateRequest,
    Identity,
    PrimeRequest,
    PrimeResult,
    Recorded,
    ScoreEvent,
    ScoreRequest,
)
from warmkv_server.contract.content import Content, Encoded
from warmkv_server.contract.fairness import Bound, Tenants
from warmkv_server.contract.grammar import RESPONSE_FORMATS
from warmkv_server.contract.model import Features
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.settings import Settings
from warmkv_server.contract.store import Durability
from warmkv_server.engine.engine import Engine
from warmkv_server.errors import WarmKVError
from warmkv_server.kv.store import AgentRecord, HeldContexts, Store
from warmkv_server.text.tokenizer_files import tokenizer_files

EventT = TypeVar("EventT")

_LOOKED_AT = 2_000
"""Agents that one page of a filtered list looks at, so that the event loop is never held up for long."""


class Agents:
    """All agents of the server, of all tenants. Used from one event loop.

    Args:
        codecs: how answers are kept for retries.
        tenants: that share the queues.
    """

    def __init__(
        self, engine: Engine, store: Store, settings: Settings, codecs: ResponseCodecs, tenants: Tenants | None = None
    ) -> None:
        self.engine = engine
        self.store = store
        self.tallies = Tallies()
        waiting = Bound(settings.max_queue, tenants or Tenants())
        self._turns = Turns(waiting)
        self._admission = Admission(settings.inflight_bytes, waiting)
        synced = settings.durability is not Durability.NONE
        self._tools = Tools(engine, store, self._turns, self._admission, self.tallies, synced, settings.keep_anonymous)
        self._codecs = codecs
        self._requests = Requests(store.outcome)
        self._runs: set[Run[Any]] = set()
        self._stopping: WarmKVError | None = None

    async def prime(self, request: PrimeRequest) -> PrimeResult | Recorded:
        """Prime and Extend."""
        return await (await self.begin_prime(request)).result()

    async def begin_prime(self, request: PrimeRequest) -> Run[PrimeResult | Recorded]:
        """Begin, join or replay a Prime or an Extend; `watch` the run for its progress."""
        name, codec = ("extend", self._codecs.extend) if request.append else ("prime", self._codecs.prime)
        begin = partial(self._begin, name, partial(prime.prime, self._tools, request, codec))
        return await self._requests.run_once(request.key, request.identity, codec, begin)

    async def generate(self, request: GenerateRequest) -> Run[GenerateEvent]:
        """Begin, join or replay an answer; `watch` the run for its events."""
        codec = self._codecs.generate

        def begin() -> Run[GenerateEvent]:
            if request.candidates:
                several = CandidateEvents(request.candidates)
                work = partial(candidates.generate_candidates, self._tools, request)
                return self._begin("generate", work, several)
            events = AnswerEvents(keep=request.identity is not None)
            return self._begin("generate", partial(generate.generate, self._tools, request, codec, events), events)

        return await self._requests.run_once(request.key, request.identity, codec, begin)

    async def score(self, request: ScoreRequest) -> Run[ScoreEvent]:
        """Begin to score; `watch` the run for its events."""
        return self._begin("score", partial(score.score, self._tools, request))

    async def fork(self, source: AgentKey, target: AgentKey, identity: Identity | None) -> AgentView | Recorded:
        codec = self._codecs.fork
        begin = partial(self._begin, "fork", partial(manage.fork, self._tools, source, target, identity, codec))
        run: Run[AgentView | Recorded] = await self._requests.run_once(target, identity, codec, begin)
        return await run.result()

    async def evict(self, key: AgentKey, drop_page_cache: bool) -> EvictResult:
        run: Run[EvictResult] = self._begin("evict", partial(manage.evict, self._tools, key, drop_page_cache))
        return await run.result()

    async def delete(self, key: AgentKey, allow_missing: bool) -> None:
        await self._begin("delete", partial(manage.delete, self._tools, key, allow_missing)).result()

    async def update(self, key: AgentKey, changes: Mapping[str, Any]) -> AgentView:
        """Change `pinned`, `ttl` (seconds, None for no limit) and `labels`, as far as `changes` has them."""

        async def work(run: Run[AgentView]) -> None:
            with run.uninterrupted():
                run.publish(self._view(await self.store.update(key.tenant, key.agent_id, **changes)))

        return await self._begin("update", work).result()

    def get(self, key: AgentKey) -> AgentView:
        if self.store.agent(*key) is None and self._turns.is_made(key):
            return self._view(AgentRecord.unmade(*key))
        return self._view(manage.require(self._tools, key))

    def page(self, tenant: str, after: str, size: int, wanted: Callable[[AgentRecord], bool]) -> AgentPage:
        """The next agents by agent_id, strictly after `after`; perhaps fewer than `size`, even when more follow."""
        found: list[AgentView] = []
        looked_at = ""
        made = sorted(each for each in self._turns.made_of(tenant) if each > after)
        unmade = (AgentRecord.unmade(tenant, each) for each in made if self.store.agent(tenant, each) is None)
        records: Iterable[AgentRecord] = self.store.agents(tenant, after)
        records = heapq.merge(records, unmade, key=lambda record: record.agent_id)
        for number, record in enumerate(islice(records, _LOOKED_AT + 1)):
            if len(found) == size or number == _LOOKED_AT:
                return AgentPage(tuple(found), looked_at)
            looked_at = record.agent_id
            if wanted(record):
                found.append(self._view(record))
        return AgentPage(tuple(found), "")

    async def count_tokens(self, key: AgentKey, content: Content | None, replace: bool) -> Encoded:
        """The tokens that Generate would put behind the agent's context, or start one with."""
        if key.agent_id:
            manage.require(self._tools, key)
        return await count(self.engine, self.store, key, content, append=not replace)

    def held(self, tenant: str) -> HeldContexts:
        """What of a tenant's contexts is at hand, and how that changes, for one reader. To be closed."""
        return self.store.held(tenant)

    async def features(self) -> Features:
        """What the model can do, as far as its chat template and its tokens were tried."""
        traits = self.engine.text.traits
        return Features(
            tool_format=traits.form.name if traits.form is not None else "",
            reasoning_marks=traits.reasoning or (),
            template_variables=traits.variables,
            keeps_reasoning=traits.keeps_reasoning,
            response_formats=RESPONSE_FORMATS if await self.engine.can_constrain() else (),
        )

    async def tokenizer_files(self) -> dict[str, bytes]:
        """What the tokenizer and the chat template are made of, by the files' names."""
        source = self.engine.text.source
        assert source is not None
        return await asyncio.to_thread(tokenizer_files, source)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn, for memory, or for the engine."""
        return self._turns.waiting + self._admission.waiting + self.engine.stats().queue_depth

    async def idle(self) -> None:
        """Wait until nothing is at work."""
        while self._runs:
            await next(iter(self._runs)).over.wait()

    def stop_all(self, reason: WarmKVError) -> None:
        """Stop everything at work, and what still comes; soon `idle`, with what the API promises committed."""
        self._stopping = reason
        for run in list(self._runs):
            run.stop(reason)

    def _begin(
        self, name: str, work: Callable[[Run[EventT]], Awaitable[None]], events: Events[EventT] | None = None
    ) -> Run[EventT]:
        run: Run[EventT] = Run(name, events)
        self._runs.add(run)
        run.when_over(lambda: self._runs.discard(run))
        run.start(work)
        if self._stopping is not None:
            run.stop(self._stopping)
        return run

    def _view(self, record: AgentRecord) -> AgentView:
        return AgentView(record, self._turns.doing(AgentKey(record.tenant, record.agent_id)))
