"""Generate: stream an answer, and keep the KV of prompt and answer."""

from __future__ import annotations

from dataclasses import replace

from warmkv_server.agents.anonymous import keep_anonymous
from warmkv_server.agents.answer_log import AnswerEvents
from warmkv_server.agents.answer_stream import AnswerStream
from warmkv_server.agents.compute import Computation, Tools, turns
from warmkv_server.agents.context import assemble, check_revision, may_splice
from warmkv_server.agents.held import held_to
from warmkv_server.agents.idempotency import RecordedResult, ResponseCodec
from warmkv_server.agents.run import Run
from warmkv_server.agents.splice import spliced
from warmkv_server.agents.types import AgentView, GenerateEvent, GenerateFinished, GenerateRequest
from warmkv_server.contract.conversation import kept
from warmkv_server.contract.generation import Answer, Finish, Finished
from warmkv_server.errors import AgentDeleted, ConstraintRanOut
from warmkv_server.kv.store import AgentRecord, RequestOutcome

CUT_SHORT = (Finish.CANCELLED, Finish.TOO_COMPLEX)


async def generate(
    tools: Tools,
    request: GenerateRequest,
    codec: ResponseCodec[GenerateEvent],
    events: AnswerEvents,
    run: Run[GenerateEvent],
) -> None:
    """Publish the answer's events as they come, and GenerateFinished once it is committed.

    Args:
        events: of the run.

    Told to stop while decoding, it commits the prompt and the tokens sampled so far, unless the agent was deleted.
    """
    key = request.key
    async with turns(tools, request.stages, run, key) as timings:
        agent = tools.store.agent(key.tenant, key.agent_id) if key.agent_id else None
        check_revision(agent, request.expected_revision)
        context = await assemble(
            tools.engine, tools.store, key, request.content, append=not request.replace, answer=True
        )
        if may_splice(request.content, whole=request.replace or not key.agent_id, said=request.splice):
            context = await spliced(tools, key, context)
        answer = fitting(request.answer, tools.engine.info.context_limit - len(context.tokens))
        grammar = held_to(request, context, tools.engine.text.traits)
        constraint = await tools.engine.constrain(grammar, key.tenant) if grammar is not None else None
        # The last token is computed again for its logits, also where its KV is there.
        limit = len(context.tokens) - (answer is not None)
        with tools.store.resolve(key.tenant, key.agent_id, context.tokens, limit) as lease:
            work = Computation(tools, key, run, context, timings, request.stages, lease, constraint)
            async with work.loaded(answer):
                stream = AnswerStream(request, run, work, events.answer)
                finished = await _answer(work, answer, stream)
                if not isinstance(run.stopped, AgentDeleted):
                    await stream.close()
                cut_short = finished is not None and finished.finish in CUT_SHORT
                if isinstance(run.stopped, AgentDeleted) or (cut_short and not stream.sampled):
                    raise_why(run)
                result = await _keep(work, request, codec, stream, finished)
        tools.tallies.add(key, work.cache, work.timings.first_token)
        if cut_short:
            raise_why(run)
        run.publish(result)


async def _answer(work: Computation, answer: Answer | None, stream: AnswerStream) -> Finished | None:
    """Compute the answer; without room for one, the rest of the prompt alone."""
    if answer is not None or work.reuse.length < len(work.context.tokens):
        finished = await work.compute(answer, stream.follow)
        return finished if answer is not None else replace(finished, finish=_without_answer(finished))
    stream.begin()
    return None


def _without_answer(finished: Finished) -> Finish:
    return Finish.LENGTH if finished.finish is Finish.PREFILLED else finished.finish


async def _keep(
    work: Computation,
    request: GenerateRequest,
    codec: ResponseCodec[GenerateEvent],
    stream: AnswerStream,
    finished: Finished | None,
) -> GenerateFinished:
    """Commit, where something is to be kept, and make the last event."""
    store, key = work.tools.store, request.key
    completion = finished.completion if finished is not None else ()
    finish = finished.finish if finished is not None else Finish.LENGTH

    def result(agent: AgentRecord | None, persisted: bool) -> GenerateFinished:
        return GenerateFinished(
            finish=finish,
            matched_stop=finished.matched_stop if finished is not None else "",
            completion_tokens=len(completion),
            cache=work.cache,
            timings=replace(work.timings),
            agent=AgentView(agent) if agent is not None else None,
            persisted=persisted,
            calls=stream.calls,
            reasoning_tokens=stream.reasoning_tokens,
            forced_tokens=finished.forced if finished is not None else 0,
        )

    def write(event: GenerateFinished) -> RequestOutcome:
        assert request.identity is not None
        sent: list[GenerateEvent] = [stream.started, stream.answer]
        if finish in CUT_SHORT:
            return codec.outcome(request.identity, sent, cancelled=True)
        return codec.outcome(request.identity, [*sent, event])

    if request.ephemeral or not key.agent_id:
        if not request.ephemeral:
            await keep_anonymous(work, completion, finished)
        return result(store.agent(key.tenant, key.agent_id) if key.agent_id else None, persisted=False)
    recorded = RecordedResult(result, write if request.identity is not None else None)
    ending = kept(work.context.ending, stream.conversation)
    committed = await work.commit(completion, finished, recorded.outcome_of, {}, ending)
    return recorded.result(committed.agent, committed.persisted)


def raise_why(run: Run[GenerateEvent]) -> None:
    """End an answer that was cut short with what cut it."""
    run.check()
    raise ConstraintRanOut(
        "the response format took too much work for the next token, or left none; what was sampled until then is kept "
        "where the request keeps anything",
        field="response_format",
    )


def fitting(answer: Answer, room: int) -> Answer | None:
    """The answer cut to the room left in the context; None if there is none."""
    return replace(answer, max_tokens=min(answer.max_tokens, room)) if room else None
