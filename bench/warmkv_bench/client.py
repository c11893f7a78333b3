"""The server as the benchmark sees it: unary calls, and a Generate whose every message is timed."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import grpc
from grpc import aio

from warmkv import v1 as pb

T = TypeVar("T")

AGENT_PREFIX = "bench."
CHANNEL_OPTIONS = (
    # Contexts and token lists can be larger than the 4 MiB that gRPC takes by default.
    ("grpc.max_receive_message_length", 64 << 20),
    # A restarted server must be reached at once, not after a back-off that grew while it was away.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)


class RequestFailed(Exception):
    """An RPC ended with an error status. The message has the RPC, the code and what the server said."""

    def __init__(self, rpc: str, error: aio.AioRpcError) -> None:
        super().__init__(f"{rpc} failed: {error.code().name}: {error.details()}")
        self.code = error.code()


class BrokenStream(Exception):
    """A Generate stream ended well but was not what the contract promises."""


@dataclass(slots=True)
class Answer:
    """One Generate, as it arrived. Times are milliseconds since just before the call, on a channel that was ready.

    `token_times_ms` has one entry for each token: when the delta with it arrived.
    """

    token_ids: list[int] = field(default_factory=list)
    token_times_ms: list[float] = field(default_factory=list)
    text: str = ""
    deltas: int = 0
    started_ms: float | None = None
    first_delta_ms: float | None = None
    e2e_ms: float = 0.0
    finished: pb.GenerateFinished = field(default_factory=pb.GenerateFinished)


class Client:
    """A connection to a server, for as long as the `async with` lasts.

    Every call has the deadline `timeout_s` (seconds), so a server that hangs becomes a failed sample.

    Raises:
        RequestFailed: from every method that calls the server.
    """

    def __init__(self, target: str, timeout_s: float) -> None:
        self.target = target
        self.timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        self._channel = aio.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        self._agents = pb.AgentServiceStub(self._channel)
        self._server = pb.ServerServiceStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def ready(self) -> None:
        """Waits until the channel is connected, so that no measured call pays for the connection."""
        while (state := self._channel.get_state(try_to_connect=True)) != grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)

    async def info(self) -> pb.GetServerInfoResponse:
        call = self._server.GetServerInfo(pb.GetServerInfoRequest(), timeout=self.timeout_s)
        return await _checked("GetServerInfo", call)

    async def stats(self) -> pb.GetServerStatsResponse:
        call = self._server.GetServerStats(pb.GetServerStatsRequest(), timeout=self.timeout_s)
        return await _checked("GetServerStats", call)

    async def token_ids(self, text: str) -> list[int]:
        """The ids that a text becomes where it starts a context."""
        request = pb.CountTokensRequest(content=pb.Content(text=text), include_token_ids=True)
        reply = await _checked("CountTokens", self._server.CountTokens(request, timeout=self.timeout_s))
        return list(reply.token_ids)

    async def count_tokens(self, content: pb.Content) -> int:
        request = pb.CountTokensRequest(content=content)
        reply = await _checked("CountTokens", self._server.CountTokens(request, timeout=self.timeout_s))
        return reply.token_count

    async def prime(self, agent_id: str, content: pb.Content) -> pb.PrimeResponse:
        request = pb.PrimeRequest(agent_id=agent_id, content=content)
        return await _checked("Prime", self._agents.Prime(request, timeout=self.timeout_s))

    async def extend(self, agent_id: str, content: pb.Content) -> pb.ExtendResponse:
        request = pb.ExtendRequest(agent_id=agent_id, content=content)
        return await _checked("Extend", self._agents.Extend(request, timeout=self.timeout_s))

    async def fork(self, source: str, agent_id: str) -> pb.Agent:
        request = pb.ForkAgentRequest(source_agent_id=source, agent_id=agent_id)
        return (await _checked("ForkAgent", self._agents.ForkAgent(request, timeout=self.timeout_s))).agent

    async def evict(self, agent_id: str, *, drop_page_cache: bool = False) -> pb.EvictAgentResponse:
        request = pb.EvictAgentRequest(agent_id=agent_id, drop_page_cache=drop_page_cache)
        return await _checked("EvictAgent", self._agents.EvictAgent(request, timeout=self.timeout_s))

    async def agent(self, agent_id: str) -> pb.Agent:
        call = self._agents.GetAgent(pb.GetAgentRequest(agent_id=agent_id), timeout=self.timeout_s)
        return (await _checked("GetAgent", call)).agent

    async def delete(self, agent_id: str) -> None:
        request = pb.DeleteAgentRequest(agent_id=agent_id, allow_missing=True)
        await _checked("DeleteAgent", self._agents.DeleteAgent(request, timeout=self.timeout_s))

    async def delete_leftovers(self) -> int:
        """Deletes every agent of the benchmark, also those of a run that died; returns how many there were."""
        ids: list[str] = []
        page_token = ""
        while True:
            request = pb.ListAgentsRequest(page_size=1000, page_token=page_token)
            page = await _checked("ListAgents", self._agents.ListAgents(request, timeout=self.timeout_s))
            ids += [agent.agent_id for agent in page.agents if agent.agent_id.startswith(AGENT_PREFIX)]
            page_token = page.next_page_token
            if not page_token:
                break
        for agent_id in ids:
            await self.delete(agent_id)
        return len(ids)

    def stream(self, request: pb.GenerateRequest) -> aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]:
        """A Generate as it is: to be iterated or cancelled, with the library's own errors."""
        return self._agents.Generate(request, timeout=self.timeout_s)

    async def generate(self, request: pb.GenerateRequest, answer: Answer | None = None) -> Answer:
        """Runs a Generate to its end and times every message.

        Args:
            answer: an empty one to fill, for a caller that reads it meanwhile, or cancels.

        Raises:
            RequestFailed: the stream ended with an error status, at whatever point.
            BrokenStream: it ended OK, but without exactly one `started` first and one `finished` last.
        """
        answer = answer or Answer()
        order: list[str] = []
        begin = time.perf_counter_ns()
        call = self._agents.Generate(request, timeout=self.timeout_s)
        try:
            async for message in call:
                now_ms = (time.perf_counter_ns() - begin) / 1e6
                order.append(_take(message, answer, now_ms))
        except aio.AioRpcError as error:
            raise RequestFailed(f"Generate (after {len(answer.token_ids)} tokens)", error) from None
        _check_order(order)
        return answer


def generation(
    agent_id: str, content: pb.Content | None, output_tokens: int, *, final: bool = False, ephemeral: bool = False
) -> pb.GenerateRequest:
    """The request that is measured: greedy, and exactly `output_tokens` long whatever the model would like."""
    return pb.GenerateRequest(
        agent_id=agent_id,
        content=content,
        sampling=pb.SamplingParams(temperature=0.0),
        max_tokens=output_tokens,
        ignore_eos=True,
        stream_mode=pb.STREAM_MODE_FINAL if final else pb.STREAM_MODE_TOKENS,
        ephemeral=ephemeral,
    )


def tokens_content(ids: Sequence[int]) -> pb.Content:
    return pb.Content(token_ids=pb.TokenIds(ids=ids))


def _take(message: pb.GenerateResponse, answer: Answer, now_ms: float) -> str:
    event = message.WhichOneof("event") or "nothing"
    if event == "delta":
        if answer.first_delta_ms is None:
            answer.first_delta_ms = now_ms
        answer.deltas += 1
        answer.text += message.delta.text
        answer.token_ids += message.delta.token_ids
        answer.token_times_ms += [now_ms] * len(message.delta.token_ids)
    elif event == "started":
        answer.started_ms = now_ms
    elif event == "finished":
        answer.finished = message.finished
        answer.e2e_ms = now_ms
    return event


def _check_order(order: list[str]) -> None:
    if not order or order[-1] != "finished" or order.count("finished") != 1:
        raise BrokenStream(f"the stream ended OK without exactly one `finished` at its end: {_shortened(order)}")
    if order[0] != "started" or order.count("started") != 1:
        raise BrokenStream(f"the stream has not exactly one `started`, first: {_shortened(order)}")


def _shortened(order: list[str]) -> str:
    return ", ".join(order if len(order) <= 8 else [*order[:4], "…", *order[-3:]]) or "no messages"


async def _checked(rpc: str, call: Awaitable[T]) -> T:
    try:
        return await call
    except aio.AioRpcError as error:
        raise RequestFailed(rpc, error) from None
