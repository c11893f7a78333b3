"""A gateway's Generate as our own: each field of it is mapped, or refused by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.agents.stages import Stages
from warmkv_server.agents.types import GenerateRequest
from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.contract.names import AGENT_ID, AgentKey
from warmkv_server.errors import InvalidField, Violation
from warmkv_server.service import convert, limits, validate
from warmkv_server.service.validate import Faults, Model

_MARK = "agent:"
"""What a request_id begins with that names an agent. Ids come from all kinds of clients, and none is an agent's by
chance."""
_END = "#"
_TOP_K_OFF = 2**32 - 1
_SEEDS = 2**64
_LARGEST = 2**31 - 1

_REFUSED = {
    "kv_transfer_params": "KV isn't handed to other servers",
    "kv_transfer_params_json": "KV isn't handed to other servers",
    "data_parallel_rank": "this server has no ranks",
    "mm_inputs": "images, audio and video can't be taken",
    "media_refs": "images, audio and video can't be taken",
}
_REFUSED_SAMPLING = {
    "prompt_logprobs": "can't be had with an answer; ask warmkv.v1.AgentService/Score for them",
    "truncate_prompt_tokens": "would drop a part of the prompt unsaid; send less",
    "structural_tag": "can't be enforced; give json_schema, regex, grammar or choice",
}
_NAMES = (
    (re.compile(r"^content\.token_ids\.ids\b|^content\b"), "tokenized.input_ids"),
    (re.compile(r"^sampling\."), "sampling_params."),
    (re.compile(r"^candidates\b"), "sampling_params.n"),
    (re.compile(r"^top_logprobs\b"), "sampling_params.logprobs"),
    (re.compile(r"^response_format\.choices\.texts\b"), "sampling_params.choice.choices"),
    (re.compile(r"^response_format\b(\.\w+)?"), "sampling_params"),
    (re.compile(r"^(max_tokens|stop|ignore_eos)\b"), r"sampling_params.\1"),
)
"""Our names of fields, and the gateway's."""


def agent_id(request_id: str) -> str:
    """The agent that an id names, as `agent:NAME#…`; empty if it names none.

    Raises:
        InvalidField: if it would, but for what it says.
    """
    if not request_id.startswith(_MARK):
        return ""
    name, end, _ = request_id.removeprefix(_MARK).partition(_END)
    if not end or not AGENT_ID.fullmatch(name):
        raise InvalidField.of(
            "request_id",
            f"begins with {_MARK!r} and names no agent: it has to be {_MARK}NAME{_END} and then what the gateway adds, "
            "where NAME has 1 to 128 characters of A-Z a-z 0-9 . _ : -",
        )
    return name


def generate_request(
    request: vllm.GenerateRequest, key: AgentKey, stages: Stages, defaults: Sampling, model: Model
) -> GenerateRequest:
    """
    Args:
        key: of the agent, if one is named.

    Raises:
        InvalidField, ContextTooLong, EmptyContent: naming every wrong field.
    """
    params = request.sampling_params
    _refuse_what_is_not_there(request, key)
    ours = _ours(request, key)
    with _under_their_names():
        validate.generate(ours, model)
    wanted = convert.generate_request(ours, key, stages, defaults, default_max_tokens=model.context_limit)
    answer = replace(wanted.answer, stop_tokens=frozenset(params.stop_token_ids), grammar=_grammar(params))
    # The gateway makes tokens of what its client sends again as text, which needn't be those that were sampled.
    return replace(wanted, answer=answer, splice=True)


def _refuse_what_is_not_there(request: vllm.GenerateRequest, key: AgentKey) -> None:
    faults, params = Faults(), request.sampling_params
    for name, why in _REFUSED.items():
        faults.need(not request.HasField(name), name, why)
    faults.need(not request.extra_mm_inputs, "extra_mm_inputs", _REFUSED["mm_inputs"])
    faults.need(request.WhichOneof("input") != "text", "text", "can't be taken; give tokenized.input_ids")
    else_empty = request.WhichOneof("input") == "text" or bool(request.tokenized.input_ids)
    faults.need(else_empty, "tokenized.input_ids", "must not be empty")
    for name, why in _REFUSED_SAMPLING.items():
        faults.need(not params.HasField(name), f"sampling_params.{name}", why)
    faults.need(
        not params.min_tokens, "sampling_params.min_tokens", "must be 0: an answer ends where the model ends it"
    )
    given = params.HasField("max_tokens")
    faults.need(not given or 0 < params.max_tokens <= _LARGEST, "sampling_params.max_tokens", "must be 1 or more")
    most = limits.TOP_LOGPROBS
    good = 0 <= params.logprobs <= most
    faults.need(good, "sampling_params.logprobs", f"must be 0 (of the answer's own tokens) to {most}")
    faults.need(params.n <= limits.CANDIDATES, "sampling_params.n", f"must be 1 to {limits.CANDIDATES}")
    one = "must be 1 for a named agent, which has one context"
    faults.need(not key.agent_id or params.n <= 1, "sampling_params.n", one)
    off = not params.HasField("json_object") or params.json_object
    faults.need(off, "sampling_params.json_object", "must be true, or left out")
    constrained = params.WhichOneof("constraint") is not None
    rule = "can't be had with a constraint, which says where it ends"
    faults.need(not (constrained and params.ignore_eos), "sampling_params.ignore_eos", rule)
    faults.refuse()


def _ours(request: vllm.GenerateRequest, key: AgentKey) -> pb.GenerateRequest:
    """The same request in our messages, as far as they have words for it."""
    params = request.sampling_params
    ids: Sequence[int] = request.tokenized.input_ids
    if ids and max(ids) > _LARGEST:
        ids = [min(token, _LARGEST) for token in ids]  # no token's either
    message = pb.GenerateRequest(
        agent_id=key.agent_id,
        content=pb.Content(token_ids=pb.TokenIds(ids=ids)),
        context_mode=pb.CONTEXT_MODE_REPLACE,
        stream_mode=pb.STREAM_MODE_TOKENS if request.stream else pb.STREAM_MODE_FINAL,
        parse_mode=pb.PARSE_MODE_TEXT,
        sampling=_sampling(params),
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        stop=params.stop,
        top_logprobs=max(1, params.logprobs) if params.HasField("logprobs") else 0,
        candidates=params.n if params.n > 1 else 0,
    )
    if params.HasField("choice"):
        message.response_format.choices.texts.extend(params.choice.choices)
    return message


def _sampling(params: vllm.SamplingParams) -> pb.SamplingParams:
    """All that has a value that means "off" is off where it isn't set; a temperature that isn't set is the model's."""
    return pb.SamplingParams(
        temperature=params.temperature if params.HasField("temperature") else None,
        top_p=params.top_p or 1.0,
        top_k=0 if params.top_k == _TOP_K_OFF else min(params.top_k, _LARGEST),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty or 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed % _SEEDS if params.HasField("seed") else None,
    )


def _grammar(params: vllm.SamplingParams) -> Grammar | None:
    kind = params.WhichOneof("constraint")
    match kind:
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, (params.json_schema,), "sampling_params.json_schema")
        case "json_object":
            return Grammar(GrammarKind.JSON_SCHEMA, ('{"type": "object"}',), "sampling_params.json_object")
        case "regex":
            return Grammar(GrammarKind.REGEX, (params.regex,), "sampling_params.regex")
        case "grammar":
            return Grammar(GrammarKind.GBNF, (params.grammar,), "sampling_params.grammar")
        case "choice":
            return Grammar(GrammarKind.CHOICES, tuple(params.choice.choices), "sampling_params.choice.choices")
    return None


@contextmanager
def _under_their_names() -> Iterator[None]:
    """What is wrong with our message, said of the fields that the gateway has sent."""
    try:
        yield
    except InvalidField as error:
        found = [Violation(_their_name(v.field), v.description, v.about) for v in error.violations]
        raise InvalidField("; ".join(f"{v.field} {v.description}" for v in found), violations=found) from None


def _their_name(field: str) -> str:
    for ours, theirs in _NAMES:
        if ours.match(field):
            return ours.sub(theirs, field, count=1)
    return field
