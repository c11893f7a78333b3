"""A server of the real service without a model, which can be told to misbehave.

It keeps contexts as token lists, "reads" and "writes" by counting, and computes nothing. Without a bug it keeps the
contract as far as the benchmark can see it.
"""

# ruff: noqa: N802, ARG002  (names and arguments are those of the generated servicers)

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import grpc
from grpc import aio

from warmkv import v1 as pb

BYTES_PER_TOKEN = 1280
FILE_BYTES = 4096
CONTEXT_LIMIT = 32768


class Bug(Enum):
    """A planted fault."""

    NONE = auto()
    # EvictAgent changes nothing and says so.
    EVICT_KEEPS = auto()
    # EvictAgent changes nothing and says that it did.
    EVICT_PRETENDS = auto()
    # The same, and Generate then says WARM, because that is what the metadata promise.
    EVICT_PRETENDS_WARM = auto()
    # Prime returns an agent of the right size, and keeps nothing.
    PRIME_FORGETS = auto()
    # Prime keeps only a part of the content.
    PRIME_CUTS = auto()
    # What is read from disk is reported as hot.
    SAYS_HOT = auto()
    # Everything is computed anew, and reported as read from disk, down to the bytes.
    SAYS_WARM = auto()
    # The stream ends with an error after a few tokens.
    BREAKS = auto()
    # The stream ends well, but without `finished`.
    ENDS_EARLY = auto()
    # The answer depends on where the KV came from.
    FORGETS_A_TOKEN_WHEN_WARM = auto()
    # The counters stand still.
    COUNTS_NOTHING = auto()
    # DeleteAgent fails.
    DELETE_FAILS = auto()


@dataclass
class Held:
    """An agent: its tokens, and whether their KV is in RAM."""

    tokens: list[int]
    hot: bool
    said_to_be_warm: bool = False


class ScriptedServer(pb.AgentServiceServicer, pb.ServerServiceServicer):
    """Both services. `seconds_per_token` makes prefills take time."""

    def __init__(self, bug: Bug = Bug.NONE, seconds_per_token: float = 0.0) -> None:
        self.bug = bug
        self.agents: dict[str, Held] = {}
        self.model_kind = pb.MODEL_KIND_BUILTIN
        self.counters = pb.ServerCounters()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._seconds_per_token = seconds_per_token

    async def Prime(self, request: pb.PrimeRequest, context: Any) -> pb.PrimeResponse:
        tokens = list(request.content.token_ids.ids)
        held = self.agents.get(request.agent_id)
        cached = _common(held.tokens, tokens) if held else 0
        await asyncio.sleep((len(tokens) - cached) * self._seconds_per_token)
        source = pb.CACHE_SOURCE_HOT if cached else pb.CACHE_SOURCE_COLD
        report = self._count(_report(source, len(tokens), cached, 0))
        kept = tokens[: len(tokens) // 2] if self.bug == Bug.PRIME_CUTS else tokens
        if self.bug != Bug.PRIME_FORGETS or held is None:
            self.agents[request.agent_id] = Held(kept, hot=True)
        promised = pb.Agent(agent_id=request.agent_id, token_count=len(tokens), tier=pb.TIER_HOT, revision=1)
        reply = pb.PrimeResponse(agent=promised, cache=report, persisted=True)
        reply.timings.prefill.FromNanoseconds(int((len(tokens) - cached) * self._seconds_per_token * 1e9))
        return reply

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async with self._turns[request.agent_id]:
            async for message in self._generate(request, context):
                yield message

    async def _generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        held = self.agents.get(request.agent_id) or Held([], hot=True)
        prompt = list(request.content.token_ids.ids)
        if request.context_mode == pb.CONTEXT_MODE_REPLACE:
            cached = min(_common(held.tokens, prompt), len(prompt) - 1)
        else:
            cached = len(held.tokens)
            prompt = held.tokens + prompt
        report = self._count(self._executed(held, len(prompt), cached))
        seconds = report.prefilled_tokens * self._seconds_per_token
        yield pb.GenerateResponse(started=pb.GenerateStarted(agent_id=request.agent_id, cache=report))
        await asyncio.sleep(seconds)
        answer: list[int] = []
        final = request.stream_mode == pb.STREAM_MODE_FINAL
        salt = 0 if held.hot or self.bug != Bug.FORGETS_A_TOKEN_WHEN_WARM else 1
        for index in range(request.max_tokens):
            token = _next_token(prompt[salt:], index)
            answer.append(token)
            if not final:
                yield pb.GenerateResponse(delta=pb.GenerateDelta(text="x", token_ids=[token]))
            if self.bug == Bug.BREAKS and index == 2:
                await context.abort(grpc.StatusCode.INTERNAL, "the engine failed (id 17)")
        if final:
            yield pb.GenerateResponse(delta=pb.GenerateDelta(text="x" * len(answer), token_ids=answer))
        held.hot = True
        if request.agent_id and not request.ephemeral:
            held.tokens = prompt + answer
            self.agents[request.agent_id] = held
        if self.bug == Bug.ENDS_EARLY:
            return
        finished = pb.GenerateFinished(
            finish_reason=pb.FINISH_REASON_LENGTH,
            usage=pb.Usage(prompt_tokens=len(prompt), cached_tokens=cached, completion_tokens=len(answer)),
            cache=report,
            agent=self._agent(request.agent_id) if request.agent_id in self.agents else None,
            persisted=bool(request.agent_id) and not request.ephemeral,
        )
        finished.timings.first_token.FromNanoseconds(int(seconds * 1e9))
        yield pb.GenerateResponse(finished=finished)

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.ExtendResponse:
        raise NotImplementedError("the benchmark does not extend")

    async def PrimeStream(self, request: pb.PrimeStreamRequest, context: Any) -> AsyncIterator[pb.PrimeStreamResponse]:
        """The benchmark doesn't ask for it, nor for the next."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, request.agent_id)
        yield pb.PrimeStreamResponse()

    async def ExtendStream(
        self, request: pb.ExtendStreamRequest, context: Any
    ) -> AsyncIterator[pb.ExtendStreamResponse]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, request.agent_id)
        yield pb.ExtendStreamResponse()

    async def UpdateAgent(self, request: pb.UpdateAgentRequest, context: Any) -> pb.UpdateAgentResponse:
        raise NotImplementedError("the benchmark does not update")

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        """The benchmark doesn't ask for it."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, request.agent_id)
        yield pb.ScoreResponse()

    async def ForkAgent(self, request: pb.ForkAgentRequest, context: Any) -> pb.ForkAgentResponse:
        source = await self._known(request.source_agent_id, context)
        self.agents[request.agent_id] = Held(list(source.tokens), source.hot)
        return pb.ForkAgentResponse(agent=self._agent(request.agent_id))

    async def EvictAgent(self, request: pb.EvictAgentRequest, context: Any) -> pb.EvictAgentResponse:
        held = await self._known(request.agent_id, context)
        if self.bug not in (Bug.EVICT_KEEPS, Bug.EVICT_PRETENDS, Bug.EVICT_PRETENDS_WARM):
            held.hot = False
        agent = self._agent(request.agent_id)
        if self.bug in (Bug.EVICT_PRETENDS, Bug.EVICT_PRETENDS_WARM):
            held.said_to_be_warm = self.bug == Bug.EVICT_PRETENDS_WARM
            agent.tier = pb.TIER_WARM
            agent.hot_bytes = 0
        return pb.EvictAgentResponse(agent=agent, resident_bytes_before=-1, resident_bytes_after=-1)

    async def GetAgent(self, request: pb.GetAgentRequest, context: Any) -> pb.GetAgentResponse:
        await self._known(request.agent_id, context)
        return pb.GetAgentResponse(agent=self._agent(request.agent_id))

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Any) -> pb.ListAgentsResponse:
        return pb.ListAgentsResponse(agents=[self._agent(name) for name in sorted(self.agents)])

    async def DeleteAgent(self, request: pb.DeleteAgentRequest, context: Any) -> pb.DeleteAgentResponse:
        if self.bug == Bug.DELETE_FAILS:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the disk does not take the deletion")
        self.agents.pop(request.agent_id, None)
        return pb.DeleteAgentResponse()

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            model_id="scripted",
            model_kind=self.model_kind,
            fingerprint="f",
            device="none",
            context_limit=CONTEXT_LIMIT,
            layers=[
                pb.LayerInfo(cache_kind=pb.CACHE_KIND_APPEND_ONLY, kv_heads=2, key_dim=64, value_dim=64, kv_bits=4)
            ],
            kv_bits=4,
            kv_group_size=64,
            kv_bytes_per_token=BYTES_PER_TOKEN,
            durability=pb.DURABILITY_FULL,
        )

    async def GetServerStats(self, request: pb.GetServerStatsRequest, context: Any) -> pb.GetServerStatsResponse:
        copy = pb.ServerCounters()
        copy.CopyFrom(self.counters)
        return pb.GetServerStatsResponse(counters=copy)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        words = request.content.text.split()
        ids = [0, *(300 + int(hashlib.md5(word.encode()).hexdigest(), 16) % 2700 for word in words)]
        return pb.CountTokensResponse(token_count=len(ids), token_ids=ids)

    def _executed(self, held: Held, prompt: int, cached: int) -> pb.CacheReport:
        """What Generate reports and counts; the lies don't reach the counters."""
        if not cached:
            return _report(pb.CACHE_SOURCE_COLD, prompt, 0, 0)
        stored = cached * BYTES_PER_TOKEN + FILE_BYTES
        if held.said_to_be_warm:
            return _report(pb.CACHE_SOURCE_WARM, prompt, cached, 0)
        return _report(
            pb.CACHE_SOURCE_HOT if held.hot else pb.CACHE_SOURCE_WARM, prompt, cached, 0 if held.hot else stored
        )

    def _count(self, truth: pb.CacheReport) -> pb.CacheReport:
        """Counts what happened, and returns what is said of it."""
        said = truth
        if self.bug == Bug.SAYS_HOT and truth.source == pb.CACHE_SOURCE_WARM:
            said = _report(pb.CACHE_SOURCE_HOT, truth.prompt_tokens, truth.cached_tokens, 0)
        if self.bug == Bug.SAYS_WARM and truth.source == pb.CACHE_SOURCE_WARM:
            truth = _report(pb.CACHE_SOURCE_COLD, truth.prompt_tokens, 0, 0)
        if self.bug == Bug.COUNTS_NOTHING:
            return said
        self.counters.requests_by_source[pb.CacheSource.Name(truth.source)] += 1
        self.counters.hot_tokens_reused += truth.hot_tokens
        self.counters.warm_tokens_reused += truth.warm_tokens
        self.counters.prefilled_tokens += truth.prefilled_tokens
        self.counters.bytes_loaded += truth.bytes_loaded
        return said

    def _agent(self, agent_id: str) -> pb.Agent:
        held = self.agents[agent_id]
        stored = len(held.tokens) * BYTES_PER_TOKEN
        return pb.Agent(
            agent_id=agent_id,
            token_count=len(held.tokens),
            tier=pb.TIER_HOT if held.hot else pb.TIER_WARM,
            hot_bytes=stored if held.hot else 0,
            warm_bytes=stored + FILE_BYTES,
            revision=1,
        )

    async def _known(self, agent_id: str, context: Any) -> Held:
        if agent_id not in self.agents:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no agent {agent_id}")
        return self.agents[agent_id]


@asynccontextmanager
async def serving(servicer: ScriptedServer) -> AsyncIterator[str]:
    """Serves on a free port of this machine; gives the address."""
    server = aio.server()
    pb.add_AgentServiceServicer_to_server(servicer, server)
    pb.add_ServerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def _report(source: pb.CacheSource.ValueType, prompt: int, cached: int, loaded: int) -> pb.CacheReport:
    return pb.CacheReport(
        source=source,
        prompt_tokens=prompt,
        cached_tokens=cached,
        hot_tokens=cached if source == pb.CACHE_SOURCE_HOT else 0,
        warm_tokens=cached if source == pb.CACHE_SOURCE_WARM else 0,
        prefilled_tokens=prompt - cached,
        bytes_loaded=loaded,
    )


def _next_token(prompt: list[int], index: int) -> int:
    return 300 + (sum(prompt) + len(prompt) + index * 7919) % 2700


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
