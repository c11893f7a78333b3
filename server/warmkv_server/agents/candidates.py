"""Several answers to one prompt, each an agent of its own if it is named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from warmkv_server.agents.anonymous import keep_anonymous
from warmkv_server.agents.answer_log import AnswerLog
from warmkv_server.agents.answer_stream import AnswerStream
from warmkv_server.agents.compute import Computation, Tools, turns
from warmkv_server.agents.context import assemble, check_revision, may_splice
from warmkv_server.agents.generate import CUT_SHORT, fitting, raise_why
from warmkv_server.agents.held import held_to
from warmkv_server.agents.run import Run
from warmkv_server.agents.splice import spliced
from warmkv_server.agents.stages import Stage
from warmkv_server.agents.types import (
    AgentView,
    CandidateDelta,
    CandidateFinished,
    GenerateEvent,
    GenerateFinished,
    GenerateRequest,
    GenerateStarted,
    PrefillProgress,
)
from warmkv_server.contract.conversation import kept
from warmkv_server.contract.generation import Answer, Delta, Event, Finish, Finished, Job, Progress
from warmkv_server.contract.kv import BLOCK_TOKENS, Growth
from warmkv_server.contract.names import AgentKey
from warmkv_server.engine.engine import Handle
from warmkv_server.engine.output.constraint import Constraint
from warmkv_server.errors import AgentDeleted, AgentExists, ContextTooLong, WarmKVError
from warmkv_server.kv.store import Committed

_SEEDS = 1 << 64


class Candidate:
    """One of the answers, as it grows.

    Attributes:
        stream: reads and publishes it.
    """

    def __init__(self, number: int, request: GenerateRequest, work: Computation) -> None:
        self._number = number
        self._told = request.answer.top_logprobs > 0
        self._run = work.run
        self._sums: list[float] = []
        self.stream = AnswerStream(request, self, work, AnswerLog())

    def publish(self, event: GenerateEvent) -> None:
        """What the stream says of it alone: its deltas. What is said once of all is said elsewhere."""
        if isinstance(event, Delta):
            self._run.publish(CandidateDelta(self._number, event))

    def follow(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._sums += [each.logprob for each in event.logprobs]
            event = event if self._told else replace(event, logprobs=())
        if not isinstance(event, Progress):
            self.stream.follow(event)

    def result(self, finished: Finished, committed: Committed | None) -> CandidateFinished:
        kept = len(finished.completion)
        agent = AgentView(committed.agent) if committed is not None else None
        total = sum(self._sums[:kept])
        return CandidateFinished(finished.finish, finished.matched_stop, kept, total, agent, self.stream.calls)


async def generate_candidates(tools: Tools, request: GenerateRequest, run: Run[GenerateEvent]) -> None:
    """Publish the answers' events as they come, and GenerateFinished once they are committed.

    Told to stop while decoding, it commits what was sampled so far of those that are named.
    """
    key = request.key
    keys = [AgentKey(key.tenant, each) for each in request.candidate_ids]
    async with turns(tools, request.stages, run, key, *keys) as timings:
        for each in keys:
            if tools.store.agent(each.tenant, each.agent_id) is not None:
                raise AgentExists(
                    f"there is an agent {each.agent_id!r} already; candidates become new ones", agent_id=each.agent_id
                )
        agent = tools.store.agent(key.tenant, key.agent_id) if key.agent_id else None
        check_revision(agent, request.expected_revision)
        context = await assemble(
            tools.engine, tools.store, key, request.content, append=not request.replace, answer=True
        )
        if may_splice(request.content, whole=request.replace or not key.agent_id, said=request.splice):
            context = await spliced(tools, key, context)
        answer = fitting(request.answer, tools.engine.info.context_limit - len(context.tokens))
        if answer is None:
            limit = tools.engine.info.context_limit
            raise ContextTooLong(
                "the prompt fills the context, and leaves no room for answers; send less",
                limit=limit,
                actual=limit + 1,
                unit="tokens",
            )
        grammar = held_to(request, context, tools.engine.text.traits)
        constraint = await tools.engine.constrain(grammar, key.tenant) if grammar is not None else None
        with tools.store.resolve(key.tenant, key.agent_id, context.tokens, len(context.tokens) - 1) as lease:
            work = Computation(tools, key, run, context, timings, request.stages, lease)
            async with work.loaded(answer):
                candidates = [Candidate(n, request, work) for n in range(request.candidates)]
                run.publish(GenerateStarted(key.agent_id, work.cache))
                prefix = await _prefill(work, request)
                finished = await _answer(work, answer, prefix, constraint, candidates)
                cut_short = any(each.finish in CUT_SHORT for each in finished)
                if isinstance(run.stopped, AgentDeleted) or not all(each.stream.sampled for each in candidates):
                    raise_why(run)
                for candidate in candidates:
                    await candidate.stream.close()
                kept = [await _keep(work, *each) for each in zip(keys, candidates, finished, strict=False)]
                if not key.agent_id and not keys and not request.ephemeral:
                    for answered in finished:
                        await keep_anonymous(work, answered.completion, answered)
        tools.tallies.add(key, work.cache, timings.first_token)
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
                calls=results[0].calls,
                reasoning_tokens=candidates[0].stream.reasoning_tokens,
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
        work.stages.enter(Stage.DECODE)
        with work.run.interrupted_by(cancel):
            reading = [_read(*pair, cancel) for pair in zip(candidates, handles, strict=True)]
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


async def _read(candidate: Candidate, handle: Handle, cancel: Callable[[], None]) -> Finished:
    try:
        async for event in handle:
            candidate.follow(event)
            if isinstance(event, Finished):
                return event
    except WarmKVError:
        cancel()
        raise
    raise AssertionError("the engine's events end with Finished")


async def _keep(work: Computation, key: AgentKey, candidate: Candidate, finished: Finished) -> Committed:
    own = replace(work, key=key, context=replace(work.context, agent=None))
    ending = kept(work.context.ending, candidate.stream.conversation)
    return await own.commit(finished.completion, finished, None, {}, ending)
