"""Several answers to one prompt, each an agent of its own if it is named."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from warmkv_server.agents.answer_log import AnswerLog
from warmkv_server.agents.compute import Computation, Tools, queued_since
from warmkv_server.agents.context import assemble, check_revision
from warmkv_server.agents.generate import CUT_SHORT, fitting, raise_why
from warmkv_server.agents.run import Run
from warmkv_server.agents.types import (
    AgentKey,
    AgentView,
    CandidateDelta,
    CandidateFinished,
    GenerateEvent,
    GenerateFinished,
    GenerateRequest,
    GenerateStarted,
    PrefillProgress,
)
from warmkv_server.contract.generation import Answer, Delta, Event, Finish, Finished, Job, Progress
from warmkv_server.contract.kv import BLOCK_TOKENS, Growth
from warmkv_server.engine.engine import Handle
from warmkv_server.engine.output.constraint import Constraint
from warmkv_server.errors import AgentDeleted, AgentExists, ContextTooLong, WarmKVError
from warmkv_server.kv.store import Committed

_SEEDS = 1 << 64


class Candidate:
    """One of the answers, as it grows."""

    def __init__(self, number: int, request: GenerateRequest, publish: Callable[[GenerateEvent], None]) -> None:
        self._number = number
        self._told = request.answer.top_logprobs > 0
        self._publish = publish
        self._whole = AnswerLog() if request.whole else None
        self._sums: list[float] = []

    def follow(self, event: Event) -> None:
        match event:
            case Delta():
                self._sums += [each.logprob for each in event.logprobs]
                delta = event if self._told else replace(event, logprobs=())
                if self._whole is not None:
                    self._whole.add(delta)
                else:
                    self._publish(CandidateDelta(self._number, delta))
            case Finished(completion=completion) if self._whole is not None:
                joined = self._whole.cut(0, len(self._whole))
                kept = len(completion)
                whole = replace(joined, token_ids=joined.token_ids[:kept], logprobs=joined.logprobs[:kept])
                self._publish(CandidateDelta(self._number, whole))

    @property
    def sampled(self) -> bool:
        return bool(self._sums)

    def result(self, finished: Finished, committed: Committed | None) -> CandidateFinished:
        kept = len(finished.completion)
        agent = AgentView(committed.agent) if committed is not None else None
        return CandidateFinished(finished.finish, finished.matched_stop, kept, sum(self._sums[:kept]), agent)


async def generate_candidates(tools: Tools, request: GenerateRequest, run: Run[GenerateEvent]) -> None:
    """Publish the answers' events as they come, and GenerateFinished once they are committed.

    Told to stop while decoding, it commits what was sampled so far of those that are named.
    """
    key = request.key
    keys = [AgentKey(key.tenant, each) for each in request.candidate_ids]
    async with AsyncExitStack() as turns:
        for each in sorted({key, *keys}):  # all in one order, so that nobody waits in a circle
            await turns.enter_async_context(tools.turns.take(each, run))
        timings = queued_since(request.arrived)
        for each in keys:
            if tools.store.agent(each.tenant, each.agent_id) is not None:
                raise AgentExists(f"there is an agent {each.agent_id!r} already; candidates become new ones")
        agent = tools.store.agent(key.tenant, key.agent_id) if key.agent_id else None
        check_revision(agent, request.expected_revision)
        context = await assemble(
            tools.engine, tools.store, key, request.content, append=not request.replace, answer=True
        )
        answer = fitting(request.answer, tools.engine.info.context_limit - len(context.tokens))
        if answer is None:
            raise ContextTooLong("the prompt fills the context, and leaves no room for answers; send less")
        grammar = request.answer.grammar
        constraint = await tools.engine.constrain(grammar, key.tenant) if grammar is not None else None
        with tools.store.resolve(key.tenant, key.agent_id, context.tokens, len(context.tokens) - 1) as lease:
            work = Computation(tools, key, run, context, timings, lease)
            async with work.loaded(answer):
                candidates = [Candidate(n, request, run.publish) for n in range(request.candidates)]
                run.publish(GenerateStarted(key.agent_id, work.cache))
                prefix = await _prefill(work, request)
                finished = await _answer(work, request, answer, prefix, constraint, candidates)
                cut_short = any(each.finish in CUT_SHORT for each in finished)
                if isinstance(run.stopped, AgentDeleted) or not all(each.sampled for each in candidates):
                    raise_why(run)
                kept = [await _keep(work, *each) for each in zip(keys, finished, strict=False)]
        tools.tallies.add(key.tenant, work.cache)
        if cut_short:
            raise_why(run)
        commits: list[Committed | None] = [*kept] or [None] * len(candidates)
        results = [
            each.result(*done) for each, done in zip(candidates, zip(finished, commits, strict=True), strict=True)
        ]
        held = tools.store.agent(key.tenant, key.agent_id) if key.agent_id else None
        run.publish(
            GenerateFinished(
                finish=results[0].finish,
                matched_stop=results[0].matched_stop,
                completion_tokens=results[0].completion_tokens,
                cache=work.cache,
                timings=replace(timings),
                agent=AgentView(held) if held is not None else None,
                persisted=bool(kept) and all(each.persisted for each in kept),
                forced_tokens=finished[0].forced,
                candidates=tuple(results),
            )
        )


async def _prefill(work: Computation, request: GenerateRequest) -> Growth | None:
    """Compute all of the prompt but its last token, once; None if that is there."""
    before = work.context.tokens[:-1]
    if work.reuse.length >= len(before):
        return None
    alone = replace(work, context=replace(work.context, tokens=before))

    def follow(event: Event) -> None:
        match event:
            case Progress(done, total) if not request.whole:
                reused = work.reuse.length
                if done > reused and total - reused > BLOCK_TOKENS:
                    work.run.publish(PrefillProgress(done - reused, total - reused))

    finished = await alone.compute(None, follow)
    if finished.finish is Finish.CANCELLED:
        work.run.check()
    return finished.growth


async def _answer(
    work: Computation,
    request: GenerateRequest,
    answer: Answer,
    prefix: Growth | None,
    constraint: Constraint | None,
    candidates: list[Candidate],
) -> list[Finished]:
    """Decode all of them. Where one fails, all do."""
    tokens: list[int] = work.context.tokens.tolist()
    handles: list[Handle] = []

    def cancel() -> None:
        for handle in handles:
            handle.cancel()

    try:
        for number in range(len(candidates)):
            job = Job(tokens, work.reuse, _own(answer, number), tenant=work.key.tenant, prefix=prefix)
            held = constraint.copy() if constraint is not None else None
            handles.append(work.tools.engine.submit(job, held))
        with work.run.interrupted_by(cancel):
            reading = [_read(work, request, *pair, cancel) for pair in zip(candidates, handles, strict=True)]
            found = await asyncio.gather(*reading, return_exceptions=True)
    finally:
        cancel()
    failed = [each for each in found if isinstance(each, BaseException)]
    if failed:
        raise failed[0]
    finished = [each for each in found if isinstance(each, Finished)]
    work.timings.decode = max(each.decode_seconds for each in finished)
    return finished


def _own(answer: Answer, number: int) -> Answer:
    """What one of them is sampled with. Log probabilities are always reported: their sum is."""
    seed = answer.sampling.seed
    sampling = replace(answer.sampling, seed=(seed + number) % _SEEDS if seed is not None else None)
    return replace(answer, sampling=sampling, top_logprobs=max(1, answer.top_logprobs))


async def _read(
    work: Computation, request: GenerateRequest, candidate: Candidate, handle: Handle, cancel: Callable[[], None]
) -> Finished:
    try:
        async for event in handle:
            if isinstance(event, Delta) and not work.timings.first_token:
                work.timings.first_token = time.perf_counter() - request.arrived
            candidate.follow(event)
            if isinstance(event, Finished):
                return event
    except WarmKVError:
        cancel()
        raise
    raise AssertionError("the engine's events end with Finished")


async def _keep(work: Computation, key: AgentKey, finished: Finished) -> Committed:
    own = replace(work, key=key, context=replace(work.context, agent=None))
    return await own.commit(finished.completion, finished, None, {})
