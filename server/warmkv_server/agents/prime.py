"""Prime and Extend: content becomes the context, or its new end, and nothing is generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from warmkv_server.agents.compute import Computation, Tools, turns
from warmkv_server.agents.context import assemble, check_revision, may_splice
from warmkv_server.agents.idempotency import RecordedResult, ResponseCodec
from warmkv_server.agents.run import Run
from warmkv_server.agents.splice import spliced
from warmkv_server.agents.types import AgentView, PrimeRequest, PrimeResult
from warmkv_server.contract.generation import Event
from warmkv_server.errors import AgentNotFound


async def prime(tools: Tools, request: PrimeRequest, codec: ResponseCodec[PrimeResult], run: Run[PrimeResult]) -> None:
    """Publish one PrimeResult, once the context is committed. All or nothing."""
    key, identity = request.key, request.identity
    async with turns(tools, request.stages, run, key, makes=not request.append) as timings:
        agent = tools.store.agent(key.tenant, key.agent_id)
        if agent is None and request.append:
            raise AgentNotFound(
                f"there is no agent {key.agent_id!r}; create it with Prime or Generate", agent_id=key.agent_id
            )
        check_revision(agent, request.expected_revision)
        context = await assemble(
            tools.engine,
            tools.store,
            key,
            request.content,
            append=request.append,
            answer=False,
            generation_prompt=request.generation_prompt,
        )
        if may_splice(request.content, whole=not request.append, said=None):
            context = await spliced(tools, key, context)
        with tools.store.resolve(key.tenant, key.agent_id, context.tokens, len(context.tokens)) as lease:
            work = Computation(tools, key, run, context, timings, request.stages, lease)
            async with work.loaded(None):
                finished = None
                if work.reuse.length < len(context.tokens):
                    finished = await work.compute(None, _ignore)
                run.check()
                recorded = RecordedResult(
                    lambda record, persisted: PrimeResult(AgentView(record), work.cache, replace(timings), persisted),
                    (lambda result: codec.outcome(identity, [result])) if identity is not None else None,
                )
                committed = await work.commit((), finished, recorded.outcome_of, _changes(request), context.kept)
        run.publish(recorded.result(committed.agent, committed.persisted))
        tools.tallies.add(key, work.cache)


def _changes(request: PrimeRequest) -> dict[str, Any]:
    given = {"pinned": request.pinned, "ttl": request.ttl, "labels": request.labels}
    return {name: value for name, value in given.items() if value is not None}


def _ignore(_: Event) -> None:
    """Prime has no events but its result."""
