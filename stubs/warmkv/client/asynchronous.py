"""The client for programs with an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from warmkv import v1
from warmkv.client import content as said
from warmkv.client.answer import Answer
from warmkv.client.channel import Target, routed
from warmkv.client.errors import WarmKVError, raising
from warmkv.client.synchronous import PAGE, READY_PAUSE, OnProgress


class AsyncClient:
    """What Client is, for one event loop: `async with AsyncClient("HOST:PORT") as client`. The methods are the same."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        tls: bool = False,
        tls_ca: str | Path | None = None,
        timeout: float | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        where = Target(target, token, tls, tls_ca, options)
        self.target = target
        self.timeout = timeout
        self.metadata = where.metadata
        self.channel = where.async_channel()
        self.agent_service = v1.AgentServiceStub(self.channel)
        self.server_service = v1.ServerServiceStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close()

    def _about(self, request: Any, timeout: float | None = None) -> dict[str, Any]:
        """How a call with this request is made."""
        return {"timeout": timeout or self.timeout, "metadata": routed(self.metadata, request)}

    # Answers

    def stream(
        self, agent_id: str, content: str | v1.Content | None = None, *, timeout: float | None = None, **fields: Any
    ) -> AsyncStream:
        return self.send(said.generation(agent_id, content, fields), timeout=timeout)

    def send(self, request: v1.GenerateRequest, *, timeout: float | None = None) -> AsyncStream:
        call = self.agent_service.Generate(request, **self._about(request, timeout))
        return AsyncStream(call)

    async def chat(
        self,
        agent_id: str,
        content: str | v1.Content | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - a deadline, which the server hears of, too
        **fields: Any,
    ) -> Answer:
        return await self.stream(agent_id, content, timeout=timeout, **fields).read()

    # An agent's life

    async def prime(
        self, agent_id: str, content: v1.Content, *, on_progress: OnProgress | None = None, **fields: Any
    ) -> v1.PrimeResponse:
        kind = v1.PrimeRequest if on_progress is None else v1.PrimeStreamRequest
        request = kind(agent_id=agent_id, content=content, **fields)
        response: v1.PrimeResponse = await self._committed("Prime", request, on_progress)
        return response

    async def extend(
        self, agent_id: str, content: v1.Content, *, on_progress: OnProgress | None = None, **fields: Any
    ) -> v1.ExtendResponse:
        kind = v1.ExtendRequest if on_progress is None else v1.ExtendStreamRequest
        request = kind(agent_id=agent_id, content=content, **fields)
        response: v1.ExtendResponse = await self._committed("Extend", request, on_progress)
        return response

    async def _committed(self, rpc: str, request: Any, on_progress: OnProgress | None) -> Any:
        """The response; who wants to be told of progress hears of it by the stream of the same."""
        name = rpc if on_progress is None else f"{rpc}Stream"
        said.identify(request)
        with raising(name):
            call = getattr(self.agent_service, name)(request, **self._about(request))
            return await call if on_progress is None else (await _followed(call, on_progress)).response

    async def fork(self, source: str, agent_id: str) -> v1.Agent:
        request = v1.ForkAgentRequest(source_agent_id=source, agent_id=agent_id)
        said.identify(request)
        with raising("ForkAgent"):
            return (await self.agent_service.ForkAgent(request, **self._about(request))).agent

    async def evict(self, agent_id: str, *, drop_page_cache: bool = False) -> v1.EvictAgentResponse:
        request = v1.EvictAgentRequest(agent_id=agent_id, drop_page_cache=drop_page_cache)
        with raising("EvictAgent"):
            return await self.agent_service.EvictAgent(request, **self._about(request))

    async def get(self, agent_id: str) -> v1.Agent:
        request = v1.GetAgentRequest(agent_id=agent_id)
        with raising("GetAgent"):
            return (await self.agent_service.GetAgent(request, **self._about(request))).agent

    async def agents(self, **fields: Any) -> AsyncIterator[v1.Agent]:
        request = v1.ListAgentsRequest(**{"page_size": PAGE, **fields})
        while True:
            with raising("ListAgents"):
                page = await self.agent_service.ListAgents(request, **self._about(request))
            for agent in page.agents:
                yield agent
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def update(self, agent: v1.Agent, paths: Iterable[str]) -> v1.Agent:
        request = v1.UpdateAgentRequest(agent=agent)
        request.update_mask.paths.extend(paths)
        with raising("UpdateAgent"):
            return (await self.agent_service.UpdateAgent(request, **self._about(request))).agent

    async def delete(self, agent_id: str, *, allow_missing: bool = False) -> None:
        request = v1.DeleteAgentRequest(agent_id=agent_id, allow_missing=allow_missing)
        with raising("DeleteAgent"):
            await self.agent_service.DeleteAgent(request, **self._about(request))

    # The server

    async def info(self) -> v1.GetServerInfoResponse:
        with raising("GetServerInfo"):
            return await self.server_service.GetServerInfo(
                v1.GetServerInfoRequest(), timeout=self.timeout, metadata=self.metadata
            )

    async def stats(self) -> v1.GetServerStatsResponse:
        with raising("GetServerStats"):
            return await self.server_service.GetServerStats(
                v1.GetServerStatsRequest(), timeout=self.timeout, metadata=self.metadata
            )

    async def count_tokens(self, content: v1.Content, **fields: Any) -> int:
        request = v1.CountTokensRequest(content=content, **fields)
        with raising("CountTokens"):
            counted = await self.server_service.CountTokens(request, **self._about(request))
            return counted.token_count

    async def wait_until_ready(self, seconds: float) -> v1.GetServerInfoResponse:
        give_up = time.monotonic() + seconds
        while True:
            try:
                return await self.info()
            except WarmKVError as error:
                left = give_up - time.monotonic()
                if not error.is_unavailable or left <= 0:
                    raise
                await asyncio.sleep(min(error.retry_after or READY_PAUSE, left))


class AsyncStream:
    """What Stream is: `async for text in stream`."""

    def __init__(self, call: Any) -> None:
        self.answer = Answer()
        self._call: Any = call

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.events():
            if event.delta.text:
                yield event.delta.text

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def events(self) -> AsyncIterator[v1.GenerateResponse]:
        try:
            async for event in self._call:
                self.answer.add(event)
                yield event
        except grpc.RpcError as error:
            raise WarmKVError.of("Generate", error) from None

    async def read(self) -> Answer:
        async for _ in self.events():
            pass
        return self.answer

    def cancel(self) -> None:
        self._call.cancel()


async def _followed(call: Any, on_progress: OnProgress) -> Any:
    """The last event of a stream of progress."""
    try:
        async for event in call:
            if event.HasField("progress"):
                on_progress(event.progress)
        return event
    finally:
        call.cancel()
