"""Score: tell how probable content is behind a context, and keep nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from warmkv_server.agents.compute import Computation, Tools, turns
from warmkv_server.agents.context import assemble
from warmkv_server.agents.run import Run
from warmkv_server.agents.types import ScoreEvent, ScoreFinished, ScoreRequest
from warmkv_server.contract.generation import Event, Score, Scored
from warmkv_server.errors import AgentNotFound
from warmkv_server.kv.store import TokenIds


async def score(tools: Tools, request: ScoreRequest, run: Run[ScoreEvent]) -> None:
    """Publish the tokens as they are computed, and ScoreFinished."""
    key = request.key
    async with turns(tools, request.stages, run, key) as timings:
        if key.agent_id and tools.store.agent(key.tenant, key.agent_id) is None:
            raise AgentNotFound(
                f"there is no agent {key.agent_id!r}; create it with Prime or Generate", agent_id=key.agent_id
            )
        context = await assemble(tools.engine, tools.store, key, request.content, append=True, answer=False)
        held = tools.store.tokens(key.tenant, key.agent_id) if context.agent is not None else context.tokens[:0]
        first = max(1, _alike(held, context.tokens))
        total = 0.0

        def follow(event: Event) -> None:
            nonlocal total
            if isinstance(event, Scored):
                total += float(event.logprobs.astype(np.float64).sum())
                run.publish(event)

        # The token before the content is computed again, for its logits.
        with tools.store.resolve(key.tenant, key.agent_id, context.tokens, first - 1) as lease:
            work = Computation(
                tools, key, run, context, timings, request.stages, lease, score=Score(first, request.top)
            )
            async with work.loaded(None):
                if len(context.tokens) > 1:
                    await work.compute(None, follow)
                run.check()
        run.publish(ScoreFinished(total, work.cache, replace(timings)))
        tools.tallies.add(key, work.cache)


def _alike(held: TokenIds, tokens: TokenIds) -> int:
    """How many tokens of the held context the new one begins with."""
    length = min(len(held), len(tokens))
    unlike = np.flatnonzero(held[:length] != tokens[:length])
    return int(unlike[0]) if unlike.size else length
