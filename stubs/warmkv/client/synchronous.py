"""The client for programs with threads, or without."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from warmkv import v1
from warmkv.client import content as said
from warmkv.client.answer import Answer
from warmkv.client.channel import Target, routed
from warmkv.client.errors import WarmKVError, raising

READY_PAUSE = 0.2
PAGE = 1000

OnProgress = Callable[[v1.PrimeProgress], object]


class Client:
    """A connection to a server, to be closed: `with Client("HOST:PORT") as client`. Threads may share it.

    Args:
        target: HOST:PORT.
        token: of the server's token file.
        tls: speak TLS, with the roots that gRPC brings.
        tls_ca: speak TLS with the roots in this file (PEM).
        timeout: seconds for each call that names none; None for no limit. A long prefill takes minutes.
        options: of gRPC's channel; they win over ours.

    Every method raises WarmKVError where its call fails. What may succeed later is tried again (SERVICE_CONFIG), and
    what changes something has a request_id, so that it is done once.

    Attributes:
        agent_service, server_service: the generated stubs on the same channel, for what isn't here.
        metadata: what calls on them have to carry.
    """

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
        self.channel = where.channel()
        self.agent_service = v1.AgentServiceStub(self.channel)
        self.server_service = v1.ServerServiceStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    def _about(self, request: Any, timeout: float | None = None) -> dict[str, Any]:
        """How a call with this request is made."""
        return {"timeout": timeout or self.timeout, "metadata": routed(self.metadata, request)}

    # Answers

    def stream(
        self, agent_id: str, content: str | v1.Content | None = None, *, timeout: float | None = None, **fields: Any
    ) -> Stream:
        """Ask an agent, and get its answer as it is sampled.

        Args:
            agent_id: is created if there is none; empty: answer once, and keep nothing.
            content: a message of the user's, or any other content; None goes on with the context.
            fields: of v1.GenerateRequest.
        """
        return self.send(said.generation(agent_id, content, fields), timeout=timeout)

    def send(self, request: v1.GenerateRequest, *, timeout: float | None = None) -> Stream:
        """A Generate as it is. The same one sent again gives the same answer, if it has a request_id."""
        call = self.agent_service.Generate(request, **self._about(request, timeout))
        return Stream(call)

    def chat(
        self, agent_id: str, content: str | v1.Content | None = None, *, timeout: float | None = None, **fields: Any
    ) -> Answer:
        """The same, and wait for the whole answer."""
        return self.stream(agent_id, content, timeout=timeout, **fields).read()

    # An agent's life

    def prime(
        self, agent_id: str, content: v1.Content, *, on_progress: OnProgress | None = None, **fields: Any
    ) -> v1.PrimeResponse:
        """Make content the agent's context. `fields` are v1.PrimeRequest's.

        Args:
            on_progress: is told how far it is; the call hears of the server every few seconds then (PrimeStream). What
                it raises ends the call.
        """
        kind = v1.PrimeRequest if on_progress is None else v1.PrimeStreamRequest
        request = kind(agent_id=agent_id, content=content, **fields)
        response: v1.PrimeResponse = self._committed("Prime", request, on_progress)
        return response

    def extend(
        self, agent_id: str, content: v1.Content, *, on_progress: OnProgress | None = None, **fields: Any
    ) -> v1.ExtendResponse:
        """Append content without an answer. `fields` are v1.ExtendRequest's; `on_progress` as for `prime`."""
        kind = v1.ExtendRequest if on_progress is None else v1.ExtendStreamRequest
        request = kind(agent_id=agent_id, content=content, **fields)
        response: v1.ExtendResponse = self._committed("Extend", request, on_progress)
        return response

    def _committed(self, rpc: str, request: Any, on_progress: OnProgress | None) -> Any:
        """The response; who wants to be told of progress hears of it by the stream of the same."""
        name = rpc if on_progress is None else f"{rpc}Stream"
        said.identify(request)
        with raising(name):
            call = getattr(self.agent_service, name)(request, **self._about(request))
            return call if on_progress is None else _followed(call, on_progress).response

    def fork(self, source: str, agent_id: str) -> v1.Agent:
        request = v1.ForkAgentRequest(source_agent_id=source, agent_id=agent_id)
        said.identify(request)
        with raising("ForkAgent"):
            return self.agent_service.ForkAgent(request, **self._about(request)).agent

    def evict(self, agent_id: str, *, drop_page_cache: bool = False) -> v1.EvictAgentResponse:
        request = v1.EvictAgentRequest(agent_id=agent_id, drop_page_cache=drop_page_cache)
        with raising("EvictAgent"):
            return self.agent_service.EvictAgent(request, **self._about(request))

    def get(self, agent_id: str) -> v1.Agent:
        request = v1.GetAgentRequest(agent_id=agent_id)
        with raising("GetAgent"):
            return self.agent_service.GetAgent(request, **self._about(request)).agent

    def agents(self, **fields: Any) -> Iterator[v1.Agent]:
        """All of them by agent_id, a page at a time. `fields` are v1.ListAgentsRequest's."""
        request = v1.ListAgentsRequest(**{"page_size": PAGE, **fields})
        while True:
            with raising("ListAgents"):
                page = self.agent_service.ListAgents(request, **self._about(request))
            yield from page.agents
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def update(self, agent: v1.Agent, paths: Iterable[str]) -> v1.Agent:
        """Change what `paths` name: any of pinned, ttl and labels."""
        request = v1.UpdateAgentRequest(agent=agent)
        request.update_mask.paths.extend(paths)
        with raising("UpdateAgent"):
            return self.agent_service.UpdateAgent(request, **self._about(request)).agent

    def delete(self, agent_id: str, *, allow_missing: bool = False) -> None:
        request = v1.DeleteAgentRequest(agent_id=agent_id, allow_missing=allow_missing)
        with raising("DeleteAgent"):
            self.agent_service.DeleteAgent(request, **self._about(request))

    # The server

    def info(self) -> v1.GetServerInfoResponse:
        with raising("GetServerInfo"):
            return self.server_service.GetServerInfo(
                v1.GetServerInfoRequest(), timeout=self.timeout, metadata=self.metadata
            )

    def stats(self) -> v1.GetServerStatsResponse:
        with raising("GetServerStats"):
            return self.server_service.GetServerStats(
                v1.GetServerStatsRequest(), timeout=self.timeout, metadata=self.metadata
            )

    def count_tokens(self, content: v1.Content, **fields: Any) -> int:
        """`fields` are v1.CountTokensRequest's."""
        request = v1.CountTokensRequest(content=content, **fields)
        with raising("CountTokens"):
            return self.server_service.CountTokens(request, **self._about(request)).token_count

    def wait_until_ready(self, seconds: float) -> v1.GetServerInfoResponse:
        """Wait for a server that isn't there yet, or that loads.

        Raises:
            WarmKVError: it isn't ready after so many seconds, or refuses for another reason.
        """
        give_up = time.monotonic() + seconds
        while True:
            try:
                return self.info()
            except WarmKVError as error:
                left = give_up - time.monotonic()
                if not error.is_unavailable or left <= 0:
                    raise
                time.sleep(min(error.retry_after or READY_PAUSE, left))


class Stream:
    """An answer on its way; iterating gives its text, piece by piece. Cancelled where a `with` block is left early.

    Attributes:
        answer: what has come so far; `answer.finished` when it is over.
    """

    def __init__(self, call: Any) -> None:
        self.answer = Answer()
        self._call: Any = call

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if event.delta.text:
                yield event.delta.text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def events(self) -> Iterator[v1.GenerateResponse]:
        """Every event as it comes, also the progress of a long prefill."""
        try:
            for event in self._call:
                self.answer.add(event)
                yield event
        except grpc.RpcError as error:
            raise WarmKVError.of("Generate", error) from None

    def read(self) -> Answer:
        """Wait for the rest, and return all of it."""
        for _ in self.events():
            pass
        return self.answer

    def cancel(self) -> None:
        """Stop it; what was sampled by then is committed. Does nothing once it is over."""
        self._call.cancel()


def _followed(call: Any, on_progress: OnProgress) -> Any:
    """The last event of a stream of progress."""
    try:
        for event in call:
            if event.HasField("progress"):
                on_progress(event.progress)
        return event
    finally:
        call.cancel()
