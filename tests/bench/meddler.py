"""A proxy in front of a real server that breaks one of its promises on the way."""

# ruff: noqa: N802, ARG002  (names and arguments are those of the generated servicers)

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import aio

from warmkv import v1 as pb


class Meddler(pb.AgentServiceServicer, pb.ServerServiceServicer):
    """Passes everything on as it is; subclasses change what one call does or says."""

    def __init__(self, channel: aio.Channel) -> None:
        self.agents = pb.AgentServiceStub(channel)
        self.server = pb.ServerServiceStub(channel)

    async def Prime(self, request: pb.PrimeRequest, context: Any) -> pb.PrimeResponse:
        return await self.agents.Prime(request)

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.ExtendResponse:
        return await self.agents.Extend(request)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for message in self.agents.Generate(request):
            yield message

    async def PrimeStream(self, request: pb.PrimeStreamRequest, context: Any) -> AsyncIterator[pb.PrimeStreamResponse]:
        async for message in self.agents.PrimeStream(request):
            yield message

    async def ExtendStream(
        self, request: pb.ExtendStreamRequest, context: Any
    ) -> AsyncIterator[pb.ExtendStreamResponse]:
        async for message in self.agents.ExtendStream(request):
            yield message

    async def ForkAgent(self, request: pb.ForkAgentRequest, context: Any) -> pb.ForkAgentResponse:
        return await self.agents.ForkAgent(request)

    async def EvictAgent(self, request: pb.EvictAgentRequest, context: Any) -> pb.EvictAgentResponse:
        return await self.agents.EvictAgent(request)

    async def GetAgent(self, request: pb.GetAgentRequest, context: Any) -> pb.GetAgentResponse:
        return await self.agents.GetAgent(request)

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Any) -> pb.ListAgentsResponse:
        return await self.agents.ListAgents(request)

    async def UpdateAgent(self, request: pb.UpdateAgentRequest, context: Any) -> pb.UpdateAgentResponse:
        return await self.agents.UpdateAgent(request)

    async def DeleteAgent(self, request: pb.DeleteAgentRequest, context: Any) -> pb.DeleteAgentResponse:
        return await self.agents.DeleteAgent(request)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        return await self.server.GetServerInfo(request)

    async def GetServerStats(self, request: pb.GetServerStatsRequest, context: Any) -> pb.GetServerStatsResponse:
        return await self.server.GetServerStats(request)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        return await self.server.CountTokens(request)


class EvictsNothing(Meddler):
    """Says that it evicted, and did not."""

    async def EvictAgent(self, request: pb.EvictAgentRequest, context: Any) -> pb.EvictAgentResponse:
        agent = (await self.agents.GetAgent(pb.GetAgentRequest(agent_id=request.agent_id))).agent
        freed, agent.tier, agent.hot_bytes = agent.hot_bytes, pb.TIER_WARM, 0
        return pb.EvictAgentResponse(agent=agent, bytes_freed=freed)


class PrimesNothing(Meddler):
    """Says that it primed, and did not."""

    async def Prime(self, request: pb.PrimeRequest, context: Any) -> pb.PrimeResponse:
        tokens = len(request.content.token_ids.ids)
        agent = pb.Agent(agent_id=request.agent_id, token_count=tokens, tier=pb.TIER_HOT, revision=1)
        return pb.PrimeResponse(agent=agent, cache=pb.CacheReport(prompt_tokens=tokens), persisted=True)


class SaysWarm(EvictsNothing):
    """Answers from RAM after an eviction that did nothing, and reports a load from disk, down to the bytes."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        held = pb.Agent()
        try:
            held = (await self.agents.GetAgent(pb.GetAgentRequest(agent_id=request.agent_id))).agent
        except aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
        async for message in self.agents.Generate(request):
            if message.WhichOneof("event") == "finished" and message.finished.cache.source == pb.CACHE_SOURCE_HOT:
                report = message.finished.cache
                report.source, report.warm_tokens, report.hot_tokens = pb.CACHE_SOURCE_WARM, report.hot_tokens, 0
                report.bytes_loaded = held.warm_bytes
            yield message


class BreaksStreams(Meddler):
    """Ends every long answer with an error after its third token."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        tokens = 0
        async for message in self.agents.Generate(request):
            yield message
            tokens += len(message.delta.token_ids)
            if tokens == 3:
                await context.abort(grpc.StatusCode.INTERNAL, "the engine failed (id 17)")


@asynccontextmanager
async def meddling(kind: type[Meddler], address: str) -> AsyncIterator[str]:
    """Serves a proxy before the server at `address`; gives the proxy's address."""
    async with aio.insecure_channel(address) as channel:
        meddler, server = kind(channel), aio.server()
        pb.add_AgentServiceServicer_to_server(meddler, server)
        pb.add_ServerServiceServicer_to_server(meddler, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)
