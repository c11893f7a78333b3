"""Between messages and what the agents take and answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.agents.stages import Stages
from warmkv_server.agents.types import (
    Activity,
    AgentView,
    CacheReport,
    CandidateDelta,
    Doing,
    EvictResult,
    GenerateEvent,
    GenerateFinished,
    GenerateRequest,
    GenerateStarted,
    Identity,
    PrefillProgress,
    PrimeRequest,
    PrimeResult,
    Recorded,
    ScoreEvent,
    ScoreFinished,
    ScoreRequest,
    Timings,
)
from warmkv_server.contract.calls import CallArguments, CallFinished, CallNews, CallStarted, CallStatus
from warmkv_server.contract.content import (
    Chat,
    ChatMessage,
    Content,
    RawText,
    TokenContent,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from warmkv_server.contract.generation import Answer, Delta, Finish, Logprobs, Sampling
from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.contract.kv import Fallback, Source
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.store import Tier
from warmkv_server.service import limits

SOURCES = {
    Source.WARM: pb.CACHE_SOURCE_WARM,
    Source.HOT: pb.CACHE_SOURCE_HOT,
    Source.SHARED: pb.CACHE_SOURCE_SHARED,
    Source.COLD: pb.CACHE_SOURCE_COLD,
}
FALLBACKS = {
    None: pb.FALLBACK_REASON_UNSPECIFIED,
    Fallback.CHECKSUM: pb.FALLBACK_REASON_CHECKSUM,
    Fallback.MISSING_BLOCK: pb.FALLBACK_REASON_MISSING_BLOCK,
    Fallback.FINGERPRINT: pb.FALLBACK_REASON_FINGERPRINT,
    Fallback.FORMAT: pb.FALLBACK_REASON_FORMAT,
    Fallback.NOT_TRIMMABLE: pb.FALLBACK_REASON_NOT_TRIMMABLE,
    Fallback.LOAD_TIMEOUT: pb.FALLBACK_REASON_LOAD_TIMEOUT,
    Fallback.QUARANTINED: pb.FALLBACK_REASON_QUARANTINED,
}
FINISHES = {
    Finish.STOP: pb.FINISH_REASON_STOP,
    Finish.LENGTH: pb.FINISH_REASON_LENGTH,
    Finish.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
}
STATUSES = {
    CallStatus.VALID: pb.TOOL_CALL_STATUS_VALID,
    CallStatus.UNKNOWN_TOOL: pb.TOOL_CALL_STATUS_UNKNOWN_TOOL,
    CallStatus.SCHEMA_MISMATCH: pb.TOOL_CALL_STATUS_SCHEMA_MISMATCH,
    CallStatus.MALFORMED: pb.TOOL_CALL_STATUS_MALFORMED,
    CallStatus.INCOMPLETE: pb.TOOL_CALL_STATUS_INCOMPLETE,
}
TOOL_MODES: dict[int, ToolMode] = {
    pb.TOOL_CHOICE_MODE_UNSPECIFIED: ToolMode.AUTO,
    pb.TOOL_CHOICE_MODE_AUTO: ToolMode.AUTO,
    pb.TOOL_CHOICE_MODE_NONE: ToolMode.NONE,
    pb.TOOL_CHOICE_MODE_REQUIRED: ToolMode.REQUIRED,
}
TIERS = {Tier.HOT: pb.TIER_HOT, Tier.WARM: pb.TIER_WARM}
ACTIVITIES = {
    Activity.IDLE: pb.ACTIVITY_IDLE,
    Activity.QUEUED: pb.ACTIVITY_QUEUED,
    Activity.LOADING: pb.ACTIVITY_LOADING,
    Activity.PREFILLING: pb.ACTIVITY_PREFILLING,
    Activity.DECODING: pb.ACTIVITY_DECODING,
}


_TOKEN_BYTES, _LOGPROB_BYTES = 5, 16
"""What a token id, and an entry with its log probability, take in a message at most."""


def content(message: pb.Content) -> Content | None:
    match message.WhichOneof("kind"):
        case "text":
            return RawText(message.text)
        case "token_ids":
            return TokenContent(tuple(message.token_ids.ids))
        case "chat":
            return chat(message.chat)
    return None


def chat(message: pb.ChatMessages) -> Chat:
    tools = tuple(Tool(t.name, t.description, t.parameters_json, t.strict) for t in message.tools.tools)
    return Chat(
        messages=tuple(_message(each) for each in message.messages),
        tools=tools if message.HasField("tools") else None,
        variables=variables(message) if message.HasField("template_variables") else None,
        continue_last=message.continue_last,
    )


def variables(message: pb.ChatMessages) -> str:
    """The variables of a chat template, as JSON; empty if there are none."""
    told = json_format.MessageToDict(message.template_variables)
    return json.dumps(told, ensure_ascii=False, sort_keys=True) if told else ""


def _message(message: pb.ChatMessage) -> ChatMessage:
    calls = tuple(ToolCall(call.id, call.name, call.arguments_json or "{}") for call in message.tool_calls)
    text = "".join(part.text for part in message.parts) if message.parts else message.content
    return ChatMessage(message.role, text, message.reasoning, calls, message.tool_call_id, message.name)


AnyPrime = pb.PrimeRequest | pb.PrimeStreamRequest
AnyExtend = pb.ExtendRequest | pb.ExtendStreamRequest

_SAME = {
    pb.PrimeStreamRequest.DESCRIPTOR.full_name: pb.PrimeRequest.DESCRIPTOR.full_name,
    pb.ExtendStreamRequest.DESCRIPTOR.full_name: pb.ExtendRequest.DESCRIPTOR.full_name,
}
"""Requests that ask for the same in the same fields, and only are answered in another way."""


def identity(request: AnyPrime | AnyExtend | pb.GenerateRequest | pb.ForkAgentRequest) -> Identity | None:
    """The request's id and a digest of everything else in it, its kind included; None without an id."""
    if not request.request_id:
        return None
    body = type(request)()
    body.CopyFrom(request)  # type: ignore[arg-type]
    body.ClearField("request_id")
    name = request.DESCRIPTOR.full_name
    hasher = hashlib.blake2b(_SAME.get(name, name).encode() + b"\0", digest_size=16)
    hasher.update(body.SerializeToString(deterministic=True))
    return Identity(request.request_id, hasher.digest())


def prime_request(request: AnyPrime, key: AgentKey, stages: Stages) -> PrimeRequest:
    return PrimeRequest(
        key=key,
        content=content(request.content),
        pinned=request.pinned if request.HasField("pinned") else None,
        ttl=seconds(request.ttl) if request.HasField("ttl") else None,
        labels=dict(request.labels) or None,
        expected_revision=_expected_revision(request),
        identity=identity(request),
        stages=stages,
    )


def extend_request(request: AnyExtend, key: AgentKey, stages: Stages) -> PrimeRequest:
    return PrimeRequest(
        key=key,
        content=content(request.content),
        append=True,
        generation_prompt=request.generation_prompt,
        expected_revision=_expected_revision(request),
        identity=identity(request),
        stages=stages,
    )


def score_request(request: pb.ScoreRequest, key: AgentKey, stages: Stages) -> ScoreRequest:
    return ScoreRequest(key, content(request.content), request.top_logprobs, stages)


def generate_request(
    request: pb.GenerateRequest, key: AgentKey, stages: Stages, defaults: Sampling, default_max_tokens: int
) -> GenerateRequest:
    return GenerateRequest(
        key=key,
        content=content(request.content),
        answer=Answer(
            sampling=sampling(request.sampling, defaults),
            max_tokens=request.max_tokens or default_max_tokens,
            stop=tuple(request.stop),
            ignore_eos=request.ignore_eos,
            top_logprobs=request.top_logprobs,
            grammar=grammar(request.response_format),
        ),
        replace=request.context_mode == pb.CONTEXT_MODE_REPLACE,
        splice=request.splice if request.HasField("splice") else None,
        whole=request.stream_mode == pb.STREAM_MODE_FINAL,
        ephemeral=request.ephemeral,
        told_apart=told_apart(request),
        choice=choice(request.tool_choice),
        drops_reasoning=request.reasoning_retention == pb.REASONING_RETENTION_DROP,
        candidates=_candidates(request),
        candidate_ids=tuple(request.candidate_agent_ids),
        expected_revision=_expected_revision(request),
        identity=identity(request),
        stages=stages,
    )


def grammar(message: pb.ResponseFormat) -> Grammar | None:
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    texts = message.choices.texts if kind == "choices" else [getattr(message, kind)]
    return Grammar(GrammarKind(kind), tuple(texts))


def choice(message: pb.ToolChoice) -> ToolChoice:
    return ToolChoice(TOOL_MODES[message.mode], tuple(message.allowed_names), message.max_calls)


def _candidates(request: pb.GenerateRequest) -> int:
    """How many answers; 0 for the one of the agent itself."""
    wanted = request.candidates or len(request.candidate_agent_ids)
    return wanted if wanted > 1 or request.candidate_agent_ids else 0


def told_apart(request: pb.GenerateRequest) -> bool:
    """Whether the answer is read as a message."""
    default = pb.PARSE_MODE_MESSAGE if request.content.HasField("chat") else pb.PARSE_MODE_TEXT
    return (request.parse_mode or default) == pb.PARSE_MODE_MESSAGE


def sampling(message: pb.SamplingParams, defaults: Sampling) -> Sampling:
    """The server's defaults, with what the request sets."""
    given = {field.name: value for field, value in message.ListFields() if field.name != "logit_bias"}
    return replace(defaults, logit_bias=dict(message.logit_bias) or defaults.logit_bias, **given)


def prime_response(result: PrimeResult | Recorded) -> pb.PrimeResponse:
    if isinstance(result, Recorded):
        again: pb.PrimeResponse = result.message
        return again
    return pb.PrimeResponse(
        agent=agent(result.agent),
        cache=cache_report(result.cache),
        timings=timings(result.timings),
        persisted=result.persisted,
    )


def extend_response(result: PrimeResult | Recorded) -> pb.ExtendResponse:
    if isinstance(result, Recorded):
        again: pb.ExtendResponse = result.message
        return again
    return pb.ExtendResponse(
        agent=agent(result.agent),
        cache=cache_report(result.cache),
        timings=timings(result.timings),
        persisted=result.persisted,
    )


def prime_progress(doing: Doing) -> pb.PrimeProgress:
    return pb.PrimeProgress(activity=ACTIVITIES[doing.activity], tokens_done=doing.done, tokens_total=doing.total)


def fork_response(forked: AgentView | Recorded) -> pb.ForkAgentResponse:
    if isinstance(forked, Recorded):
        again: pb.ForkAgentResponse = forked.message
        return again
    return pb.ForkAgentResponse(agent=agent(forked))


def evict_response(result: EvictResult) -> pb.EvictAgentResponse:
    return pb.EvictAgentResponse(
        agent=agent(result.agent),
        bytes_freed=result.bytes_freed,
        resident_bytes_before=result.resident_before,
        resident_bytes_after=result.resident_after,
    )


def generate_responses(event: GenerateEvent) -> Iterator[pb.GenerateResponse]:
    """The messages of an event: one, unless it is more of an answer than clients take in one."""
    match event:
        case GenerateStarted(agent_id, cache):
            yield pb.GenerateResponse(started=pb.GenerateStarted(agent_id=agent_id, cache=cache_report(cache)))
        case PrefillProgress(done, total):
            yield pb.GenerateResponse(prefill_progress=pb.PrefillProgress(tokens_done=done, tokens_total=total))
        case Delta():
            yield from _delta(event)
        case CandidateDelta(number, delta):
            yield from _delta(delta, number)
        case GenerateFinished():
            yield pb.GenerateResponse(finished=_finished(event))
        case Recorded(message):
            yield message


def _delta(delta: Delta, candidate: int = 0) -> Iterator[pb.GenerateResponse]:
    for piece in _pieces(delta):
        message = pb.GenerateDelta(
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=[_logprobs(each) for each in piece.logprobs],
            reasoning=piece.reasoning,
            tool_calls=[_call_news(news) for news in piece.calls],
            candidate=candidate,
        )
        yield pb.GenerateResponse(delta=message)


def score_responses(event: ScoreEvent) -> Iterator[pb.ScoreResponse]:
    """The messages of an event: one, unless it is of more tokens than go into one."""
    if isinstance(event, ScoreFinished):
        yield pb.ScoreResponse(
            logprob_sum=event.logprob_sum, cache=cache_report(event.cache), timings=timings(event.timings)
        )
        return
    rows = zip(
        event.token_ids.tolist(), event.logprobs.tolist(), event.top_ids.tolist(), event.top.tolist(), strict=True
    )
    told = [Logprobs(token, value, tuple(zip(ids, top, strict=True))) for token, value, ids, top in rows]
    for first in range(0, len(told), limits.SCORED_TOKENS):
        yield pb.ScoreResponse(tokens=[_logprobs(each) for each in told[first : first + limits.SCORED_TOKENS]])


def agent(view: AgentView) -> pb.Agent:
    record = view.record
    return pb.Agent(
        agent_id=record.agent_id,
        tier=TIERS[record.tier],
        token_count=record.token_count,
        revision=record.revision,
        hot_bytes=record.hot_bytes,
        warm_bytes=record.warm_bytes,
        shared_bytes=record.shared_bytes,
        pinned=record.pinned,
        ttl=duration(record.ttl) if record.ttl is not None else None,
        labels=record.labels,
        create_time=timestamp(record.create_time) if record.revision else None,
        update_time=timestamp(record.update_time) if record.revision else None,
        last_used_time=timestamp(record.last_used_time) if record.revision else None,
        expire_time=timestamp(record.expire_time) if record.expire_time is not None else None,
        parent_agent_id=record.parent_agent_id,
        activity=ACTIVITIES[view.doing.activity],
        tokens_done=view.doing.done,
        tokens_total=view.doing.total,
        stale_tokens=0 if record.fingerprint_ok else record.token_count,
        fingerprint_differences=record.fingerprint_differences,
    )


def cache_report(cache: CacheReport) -> pb.CacheReport:
    return pb.CacheReport(
        source=SOURCES[cache.source],
        prompt_tokens=cache.prompt_tokens,
        cached_tokens=cache.cached_tokens,
        hot_tokens=cache.hot_tokens,
        warm_tokens=cache.warm_tokens,
        shared_tokens=cache.shared_tokens,
        prefilled_tokens=cache.prefilled_tokens,
        bytes_loaded=cache.bytes_loaded,
        fallback_reason=FALLBACKS[cache.fallback],
        held_tokens=cache.held_tokens,
        spliced_tokens=cache.spliced_tokens,
    )


def timings(value: Timings) -> pb.Timings:
    return pb.Timings(
        queue=duration(value.queue),
        load=duration(value.load),
        prefill=duration(value.prefill),
        first_token=duration(value.first_token),
        decode=duration(value.decode),
        commit=duration(value.commit),
    )


def duration(value: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(value * 1e9))
    return message


def seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9


def timestamp(value: float) -> Timestamp:
    message = Timestamp()
    message.FromMicroseconds(round(value * 1e6))
    return message


def _pieces(delta: Delta) -> Iterator[Delta]:
    """A delta cut so that each piece fits into a message."""
    alternatives = len(delta.logprobs[0].top) if delta.logprobs else 0
    token_bytes = _TOKEN_BYTES + (_LOGPROB_BYTES * (1 + alternatives) if delta.logprobs else 0)
    tokens, characters = limits.DELTA_BYTES // token_bytes, limits.DELTA_CHARACTERS
    longest = max(len(delta.text), len(delta.reasoning))
    pieces = max(1, -(-len(delta.token_ids) // tokens), -(-longest // characters))
    small = pieces == 1 and sum(map(_characters, delta.calls)) + len(delta.text) + len(delta.reasoning) <= characters
    for piece in range(pieces):
        here, there = slice(piece * tokens, (piece + 1) * tokens), slice(piece * characters, (piece + 1) * characters)
        yield Delta(
            delta.token_ids[here],
            delta.text[there],
            delta.logprobs[here],
            delta.reasoning[there],
            delta.calls if small else (),
        )
    for news in () if small else delta.calls:
        if isinstance(news, CallArguments):
            for at in range(0, len(news.text), characters):
                yield Delta((), "", calls=(CallArguments(news.index, news.text[at : at + characters]),))
        else:
            yield Delta((), "", calls=(news,))


def _characters(news: CallNews) -> int:
    match news:
        case CallArguments():
            return len(news.text)
        case CallFinished():
            return len(news.call.arguments) + len(news.raw)
    return 0


def _call_news(news: CallNews) -> pb.ToolCallDelta:
    match news:
        case CallStarted():
            return pb.ToolCallDelta(index=news.index, started=pb.ToolCallStarted(id=news.id, name=news.name))
        case CallArguments():
            return pb.ToolCallDelta(index=news.index, arguments=news.text)
        case CallFinished():
            return pb.ToolCallDelta(index=news.index, finished=_call_finished(news))


def _call_finished(news: CallFinished) -> pb.ToolCallFinished:
    call = news.call
    return pb.ToolCallFinished(
        call=pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments),
        status=STATUSES[news.status],
        raw=news.raw,
    )


def _finished(event: GenerateFinished) -> pb.GenerateFinished:
    return pb.GenerateFinished(
        finish_reason=_finish_reason(event.finish, event.calls),
        matched_stop=event.matched_stop,
        usage=pb.Usage(
            prompt_tokens=event.cache.prompt_tokens,
            cached_tokens=event.cache.cached_tokens,
            completion_tokens=event.completion_tokens,
            reasoning_tokens=event.reasoning_tokens,
            forced_tokens=event.forced_tokens,
        ),
        cache=cache_report(event.cache),
        timings=timings(event.timings),
        agent=agent(event.agent) if event.agent is not None else None,
        persisted=event.persisted,
        tool_calls=[_call_finished(call) for call in event.calls],
        candidates=[
            pb.CandidateFinished(
                finish_reason=_finish_reason(each.finish, each.calls),
                matched_stop=each.matched_stop,
                completion_tokens=each.completion_tokens,
                logprob_sum=each.logprob_sum,
                agent=agent(each.agent) if each.agent is not None else None,
                tool_calls=[_call_finished(call) for call in each.calls],
            )
            for each in event.candidates
        ],
    )


def _finish_reason(finish: Finish, calls: tuple[CallFinished, ...]) -> pb.FinishReason.ValueType:
    return pb.FINISH_REASON_TOOL_CALLS if calls and finish is Finish.STOP else FINISHES[finish]


def _logprobs(value: Logprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in value.top]
    return pb.TokenLogprobs(token_id=value.token_id, logprob=value.logprob, top=top)


def _expected_revision(request: AnyPrime | AnyExtend | pb.GenerateRequest) -> int | None:
    return request.expected_revision if request.HasField("expected_revision") else None
