"""warmkv.v1.AgentService."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Any

from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.agents.types import GenerateFinished, PrimeRequest, PrimeResult, Recorded
from warmkv_server.contract.settings import Settings
from warmkv_server.contract.store import AgentRecord
from warmkv_server.errors import InvalidField
from warmkv_server.service import convert, limits, validate
from warmkv_server.service.endpoint import Call
from warmkv_server.service.metrics import Metrics

_PAGE = 100
_LARGEST_PAGE = 1000
_PROGRESS_SECONDS = 5.0
"""From one message of a stream to the next, at most: proxies end those that are silent for a minute, say."""


@dataclass(frozen=True)
class AgentServicer:
    """The RPCs of AgentService. proto/warmkv/v1/agent_service.proto says what each promises."""

    settings: Settings
    metrics: Metrics

    async def prime(self, request: pb.PrimeRequest, call: Call) -> pb.PrimeResponse:
        validate.prime(request, call.model)
        wanted = convert.prime_request(request, call.key(request.agent_id), call.stages)
        return convert.prime_response(self._counted(await call.agents.prime(wanted)))

    async def extend(self, request: pb.ExtendRequest, call: Call) -> pb.ExtendResponse:
        validate.extend(request, call.model)
        wanted = convert.extend_request(request, call.key(request.agent_id), call.stages)
        return convert.extend_response(self._counted(await call.agents.prime(wanted)))

    async def prime_stream(self, request: pb.PrimeStreamRequest, call: Call) -> None:
        validate.prime(request, call.model)
        wanted = convert.prime_request(request, call.key(request.agent_id), call.stages)
        result = await self._told(wanted, call, pb.PrimeStreamResponse)
        await call.send(pb.PrimeStreamResponse(response=convert.prime_response(result)))

    async def extend_stream(self, request: pb.ExtendStreamRequest, call: Call) -> None:
        validate.extend(request, call.model)
        wanted = convert.extend_request(request, call.key(request.agent_id), call.stages)
        result = await self._told(wanted, call, pb.ExtendStreamResponse)
        await call.send(pb.ExtendStreamResponse(response=convert.extend_response(result)))

    async def generate(self, request: pb.GenerateRequest, call: Call) -> None:
        info = call.agents.engine.info
        validate.generate(request, call.model)
        wanted = convert.generate_request(
            request, call.key(request.agent_id), call.stages, info.sampling_defaults, self.settings.default_max_tokens
        )
        for each in request.candidate_agent_ids:
            call.key(each)
        run = await call.agents.generate(wanted)
        with run.watch() as events:
            async for event in events:
                if isinstance(event, GenerateFinished):
                    self.metrics.answered(event)
                for message in convert.generate_responses(event):
                    await call.send(message)

    async def score(self, request: pb.ScoreRequest, call: Call) -> None:
        validate.score(request, call.model)
        wanted = convert.score_request(request, call.key(request.agent_id), call.stages)
        run = await call.agents.score(wanted)
        with run.watch() as events:
            async for event in events:
                for message in convert.score_responses(event):
                    await call.send(message)

    async def fork_agent(self, request: pb.ForkAgentRequest, call: Call) -> pb.ForkAgentResponse:
        validate.fork(request)
        source, target = call.key(request.source_agent_id), call.key(request.agent_id)
        forked = await call.agents.fork(source, target, convert.identity(request))
        return convert.fork_response(forked)

    async def evict_agent(self, request: pb.EvictAgentRequest, call: Call) -> pb.EvictAgentResponse:
        validate.agent_id(request.agent_id)
        evicted = await call.agents.evict(call.key(request.agent_id), request.drop_page_cache)
        return convert.evict_response(evicted)

    async def get_agent(self, request: pb.GetAgentRequest, call: Call) -> pb.GetAgentResponse:
        validate.agent_id(request.agent_id)
        return pb.GetAgentResponse(agent=convert.agent(call.agents.get(call.key(request.agent_id))))

    async def list_agents(self, request: pb.ListAgentsRequest, call: Call) -> pb.ListAgentsResponse:
        validate.list_agents(request)

        def wanted(record: AgentRecord) -> bool:
            return (
                record.agent_id.startswith(call.principal.agent_prefix)
                and (not request.tier or convert.TIERS[record.tier] == request.tier)
                and all(record.labels.get(key) == value for key, value in request.labels.items())
            )

        size = min(request.page_size or _PAGE, _LARGEST_PAGE)
        page = call.agents.page(call.principal.tenant, _page_start(request), size, wanted)
        response, nbytes = pb.ListAgentsResponse(), 0
        after = page.next_after
        for view in page.agents:
            agent = convert.agent(view)
            nbytes += agent.ByteSize()
            if nbytes > limits.PAGE_BYTES:
                after = response.agents[-1].agent_id  # the rest is on the next page
                break
            response.agents.append(agent)
        response.next_page_token = _page_token(request, after) if after else ""
        return response

    async def update_agent(self, request: pb.UpdateAgentRequest, call: Call) -> pb.UpdateAgentResponse:
        validate.update(request)
        given = request.agent
        values: dict[str, Any] = {
            "pinned": given.pinned,
            "ttl": convert.seconds(given.ttl) if given.HasField("ttl") else None,
            "labels": dict(given.labels),
        }
        changes = {path: values[path] for path in request.update_mask.paths}
        updated = await call.agents.update(call.key(given.agent_id), changes)
        return pb.UpdateAgentResponse(agent=convert.agent(updated))

    async def delete_agent(self, request: pb.DeleteAgentRequest, call: Call) -> pb.DeleteAgentResponse:
        validate.agent_id(request.agent_id)
        await call.agents.delete(call.key(request.agent_id), request.allow_missing)
        return pb.DeleteAgentResponse()

    async def _told(
        self, wanted: PrimeRequest, call: Call, kind: type[pb.PrimeStreamResponse | pb.ExtendStreamResponse]
    ) -> PrimeResult | Recorded:
        """The result; its progress is sent meanwhile."""
        run = await call.agents.begin_prime(wanted)
        with run.watch() as watch:
            async for doing in watch.progress(_PROGRESS_SECONDS):
                await call.send(kind(progress=convert.prime_progress(doing)))
            return self._counted(await watch.last())

    def _counted(self, result: PrimeResult | Recorded) -> PrimeResult | Recorded:
        if isinstance(result, PrimeResult):  # Not one that was done before, and is told again.
            self.metrics.primed(result)
        return result


def _page_token(request: pb.ListAgentsRequest, after: str) -> str:
    return base64.urlsafe_b64encode(_filters(request) + after.encode()).decode()


def _page_start(request: pb.ListAgentsRequest) -> str:
    """The agent_id behind which the page begins."""
    if not request.page_token:
        return ""
    try:
        raw = base64.urlsafe_b64decode(request.page_token.encode())
        filters, after = raw[:8], raw[8:].decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        filters, after = b"", ""
    if filters != _filters(request) or not after:
        raise InvalidField.of("page_token", "is not a next_page_token of a call with the same filters")
    return after


def _filters(request: pb.ListAgentsRequest) -> bytes:
    filters = pb.ListAgentsRequest(tier=request.tier, labels=request.labels)
    return hashlib.blake2b(filters.SerializeToString(deterministic=True), digest_size=8).digest()
