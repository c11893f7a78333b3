"""Whether a request makes sense by itself: every wrong field of it, at once.

What depends on the agent or on the tokenizer is checked where that is known, at the agent's turn. How many of what a
field may have is in limits.py; wire.py has made sure that there is nothing here to look at for long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.duration_pb2 import Duration

from warmkv.v1 import agent_service_pb2 as pb
from warmkv.v1 import server_service_pb2 as server_pb
from warmkv_server.contract.names import AGENT_ID, AGENT_ID_RULE
from warmkv_server.errors import About, ContextTooLong, EmptyContent, InvalidField, Violation
from warmkv_server.service import chats, convert, limits

_SECOND = 1_000_000_000
_LONGEST_TTL = 100 * 365 * 86400 * _SECOND
"""Nanoseconds. Later than that, times run out of what a Timestamp can hold."""
_UPDATABLE = ("pinned", "ttl", "labels")


_NO_TEXT = pb.Content(text="")


class Faults:
    """The wrong fields of one request: the first of them, and how many there are."""

    def __init__(self) -> None:
        self._found: list[Violation] = []
        self._empty: list[Violation] = []
        self._more = 0
        self._too_long: ContextTooLong | None = None

    def need(self, good: bool, field: str, description: str) -> None:
        """Note that a field is wrong, and what it must be, unless it is good."""
        if not good:
            self.note(field, description)

    def need_at_most(self, most: int, actual: int, unit: str, field: str, description: str = "") -> None:
        """Note that a field has too much of something, unless it has no more than the most.

        Args:
            unit: what there is too much of, such as entries, characters or bytes.
            description: what it must be, if that isn't said by the most.
        """
        if actual > most:
            self.note(field, description or f"may have {most} {unit} at most", limits.about(most, actual, unit))

    def need_within(self, least: int, most: int, actual: int, unit: str, field: str, description: str) -> None:
        """The same of what may have too little, too."""
        self.need(actual >= least, field, description)
        self.need_at_most(most, actual, unit, field, description)

    def note(self, field: str, description: str, about: Mapping[str, About] | None = None) -> None:
        """Note that a field is wrong, and what it must be.

        Args:
            about: what else there is to say, to programs.
        """
        if len(self._found) < limits.VIOLATIONS:
            self._found.append(Violation(field, description, about or {}))
        else:
            self._more += 1

    def more(self, count: int) -> None:
        """Count wrong fields that aren't named."""
        self._more += count

    def need_content(self, present: bool) -> None:
        if not present:
            self._empty.append(Violation("content", "must not be empty: give text, token_ids or chat"))

    def too_long(self, tokens: int, most: int) -> None:
        """Note that no context could hold the content."""
        self._too_long = ContextTooLong(
            f"the content has {tokens} tokens, and this server takes {most}; send less",
            field="content.token_ids.ids",
            **limits.about(most, tokens, "tokens"),
        )

    def refuse(self) -> None:
        """Raise if anything is wrong.

        Raises:
            InvalidField, or ContextTooLong or EmptyContent if that is all.
        """
        if self._found:
            found = [*self._found, *self._empty]
            message = "; ".join(f"{v.field} {v.description}" for v in found)
            if self._more:
                message = f"{len(found) + self._more} fields are wrong: {message}"
                found.append(Violation("…", f"{self._more} more fields are wrong"))
            raise InvalidField(message, violations=found)
        if self._too_long is not None:
            raise self._too_long
        if self._empty:
            raise EmptyContent("content must not be empty: give text, token_ids or chat", violations=self._empty)


@dataclass(frozen=True)
class Model:
    """What the model takes: ids below `vocab_size`, and contexts up to `context_limit` tokens."""

    vocab_size: int
    context_limit: int


def prime(request: convert.AnyPrime, model: Model) -> None:
    faults = Faults()
    _agent_id(faults, "agent_id", request.agent_id)
    _content(faults, request.content, model.vocab_size, model.context_limit)
    faults.need_content(_is_given(request.content))
    if request.HasField("ttl"):
        _ttl(faults, "ttl", request.ttl)
    _labels(faults, "labels", request.labels)
    _expected_revision(faults, request)
    _request_id(faults, request.request_id)
    faults.refuse()


def extend(request: convert.AnyExtend, model: Model) -> None:
    faults = Faults()
    chat = request.content.WhichOneof("kind") == "chat"
    faults.need(chat or not request.generation_prompt, "generation_prompt", "needs content.chat")
    _agent_id(faults, "agent_id", request.agent_id)
    _content(faults, request.content, model.vocab_size, model.context_limit)
    faults.need_content(_is_given(request.content))
    _expected_revision(faults, request)
    _request_id(faults, request.request_id)
    faults.refuse()


def generate(request: pb.GenerateRequest, model: Model) -> None:
    faults = Faults()
    if request.agent_id:
        _agent_id(faults, "agent_id", request.agent_id)
    else:
        unset = not request.HasField("expected_revision")
        faults.need(unset, "expected_revision", "needs an agent_id")
        faults.need_content(_is_given(request.content))
    _enum(faults, "context_mode", request.context_mode, pb.ContextMode)
    _enum(faults, "stream_mode", request.stream_mode, pb.StreamMode)
    _enum(faults, "parse_mode", request.parse_mode, pb.ParseMode)
    _enum(faults, "reasoning_retention", request.reasoning_retention, pb.ReasoningRetention)
    drops = request.reasoning_retention == pb.REASONING_RETENTION_DROP
    rule = "needs PARSE_MODE_MESSAGE: reasoning that isn't told apart can't be dropped"
    faults.need(not drops or convert.told_apart(request), "reasoning_retention", rule)
    _content(faults, request.content, model.vocab_size, model.context_limit)
    if request.agent_id and request.context_mode == pb.CONTEXT_MODE_REPLACE:
        faults.need_content(_is_given(request.content))
    whole = not request.agent_id or request.context_mode == pb.CONTEXT_MODE_REPLACE
    faults.need(whole or not request.splice, "splice", "needs CONTEXT_MODE_REPLACE, or no agent_id")
    _sampling(faults, request.sampling, model.vocab_size)
    faults.need(request.max_tokens >= 0, "max_tokens", "must be 0 (the server's default) or more")
    _stop(faults, request.stop)
    _candidates(faults, request)
    if request.HasField("response_format"):
        _response_format(faults, request)
    if request.HasField("tool_choice"):
        chats.choice(faults, request)
    _top_logprobs(faults, request.top_logprobs, model.vocab_size)
    _expected_revision(faults, request)
    _request_id(faults, request.request_id)
    if request.request_id:
        faults.need(not request.ephemeral, "request_id", "can't be kept for an ephemeral request")
        faults.need(bool(request.agent_id), "request_id", "needs an agent_id")
    faults.refuse()


def score(request: pb.ScoreRequest, model: Model) -> None:
    faults = Faults()
    if request.agent_id:
        _agent_id(faults, "agent_id", request.agent_id)
    _content(faults, request.content, model.vocab_size, model.context_limit)
    faults.need_content(_is_given(request.content))
    _top_logprobs(faults, request.top_logprobs, model.vocab_size)
    faults.refuse()


def fork(request: pb.ForkAgentRequest) -> None:
    faults = Faults()
    _agent_id(faults, "source_agent_id", request.source_agent_id)
    _agent_id(faults, "agent_id", request.agent_id)
    _request_id(faults, request.request_id)
    faults.refuse()


def agent_id(value: str) -> None:
    """A request that has nothing else to check."""
    faults = Faults()
    _agent_id(faults, "agent_id", value)
    faults.refuse()


def list_agents(request: pb.ListAgentsRequest) -> None:
    faults = Faults()
    faults.need(request.page_size >= 0, "page_size", "must be 0 (the default) or more")
    _enum(faults, "tier", request.tier, pb.Tier)
    _labels(faults, "labels", request.labels)
    faults.refuse()


def update(request: pb.UpdateAgentRequest) -> None:
    faults = Faults()
    _agent_id(faults, "agent.agent_id", request.agent.agent_id)
    paths = request.update_mask.paths[: limits.UPDATE_PATHS + 1]
    faults.need_at_most(limits.UPDATE_PATHS, len(request.update_mask.paths), "paths", "update_mask")
    known = [path for path in paths if path in _UPDATABLE]
    faults.need(bool(paths), "update_mask", "must name at least one of pinned, ttl, labels")
    faults.need(len(known) == len(paths), "update_mask", "may name pinned, ttl and labels only")
    if "ttl" in known and request.agent.HasField("ttl"):
        _ttl(faults, "agent.ttl", request.agent.ttl)
    if "labels" in known:
        _labels(faults, "agent.labels", request.agent.labels)
    faults.refuse()


def count_tokens(request: server_pb.CountTokensRequest, model: Model) -> None:
    faults = Faults()
    if request.agent_id:
        _agent_id(faults, "agent_id", request.agent_id)
    _enum(faults, "context_mode", request.context_mode, pb.ContextMode)
    _content(faults, request.content, model.vocab_size, max(model.context_limit, limits.COUNTED_TOKENS))
    faults.need_content(_is_given(request.content))
    faults.refuse()


def _agent_id(faults: Faults, field: str, value: str) -> None:
    faults.need(AGENT_ID.fullmatch(value) is not None, field, AGENT_ID_RULE)


def _top_logprobs(faults: Faults, value: int, vocab_size: int) -> None:
    most = min(limits.TOP_LOGPROBS, vocab_size)
    faults.need_within(0, most, value, "entries", "top_logprobs", f"must be 0 to {most}")


def _stop(faults: Faults, stop: Sequence[str]) -> None:
    """They are looked for in every piece of the answer, all at once, by what is built of all their characters."""
    faults.need_at_most(limits.STOPS, len(stop), "strings", "stop")
    lengths = [len(each) for each in stop]
    rule = f"must have 1 to {limits.STOP_CHARACTERS} characters"
    for number, length in enumerate(lengths):
        faults.need_within(1, limits.STOP_CHARACTERS, length, "characters", f"stop[{number}]", rule)
    rule = f"may have {limits.STOPS_CHARACTERS} characters at most in all"
    faults.need_at_most(limits.STOPS_CHARACTERS, sum(lengths), "characters", "stop", rule)


def _candidates(faults: Faults, request: pb.GenerateRequest) -> None:
    ids, most = request.candidate_agent_ids, limits.CANDIDATES
    faults.need_within(0, most, request.candidates, "entries", "candidates", f"must be 0 (one) to {most}")
    faults.need_at_most(most, len(ids), "entries", "candidate_agent_ids")
    for number, value in enumerate(ids[: most + 1]):
        _agent_id(faults, f"candidate_agent_ids[{number}]", value)
    if ids:
        faults.need(request.candidates in (0, len(ids)), "candidates", "must be as many as candidate_agent_ids, or 0")
        distinct = len({request.agent_id, *ids}) == len(ids) + 1
        faults.need(distinct, "candidate_agent_ids", "must all be different, and none the agent's own")
        faults.need(not request.ephemeral, "candidate_agent_ids", "can't be made by an ephemeral request")
    elif request.candidates > 1:
        free = request.ephemeral or not request.agent_id
        faults.need(free, "candidates", "need candidate_agent_ids, ephemeral, or no agent_id: an agent has one context")
    if ids or request.candidates > 1:
        faults.need(not request.request_id, "request_id", "can't be kept for candidates")


def _response_format(faults: Faults, request: pb.GenerateRequest) -> None:
    """What is in it is judged where it can be tried (text/trial.py)."""
    wanted = request.response_format
    kind = wanted.WhichOneof("kind")
    forms = "json_schema, regex, lark or choices"
    faults.need(kind is not None, "response_format", f"must have one of {forms}")
    faults.need(not request.ignore_eos, "ignore_eos", "can't be had with a response_format, which says where it ends")
    if kind == "choices":
        texts = wanted.choices.texts
        size = sum(len(text.encode()) for text in texts)
        faults.need(bool(texts), "response_format.choices.texts", "must have at least one text")
        faults.need(all(texts), "response_format.choices.texts", "must have no empty text")
        faults.need(len(set(texts)) == len(texts), "response_format.choices.texts", "must all be different")
        most = limits.STRING_BYTES
        rule = f"may have {most} bytes at most in all"
        faults.need_at_most(most, size, "bytes", "response_format.choices.texts", rule)


def _is_given(content: pb.Content) -> bool:
    match content.WhichOneof("kind"):
        case "text":
            return content != _NO_TEXT  # which makes no string of what may be megabytes
        case "token_ids":
            return bool(content.token_ids.ids)
        case "chat":
            return bool(content.chat.messages)
    return False


def _content(faults: Faults, content: pb.Content, vocab_size: int, most_tokens: int) -> None:
    ids = content.token_ids.ids
    if len(ids) > most_tokens:
        faults.too_long(len(ids), most_tokens)
    elif ids and (min(ids) < 0 or max(ids) >= vocab_size):
        given = np.fromiter(ids, np.int64, len(ids))
        wrong = np.flatnonzero((given < 0) | (given >= vocab_size))
        named = wrong[: limits.VIOLATIONS].tolist()
        for number in named:
            rule = f"{given[number]} is not a token of this model; ids run from 0 to {vocab_size - 1}"
            faults.note(f"content.token_ids.ids[{number}]", rule)
        faults.more(len(wrong) - len(named))
    if content.HasField("chat"):
        chats.chat(faults, content.chat)


def _ttl(faults: Faults, field: str, ttl: Duration) -> None:
    good = 0 <= ttl.nanos < _SECOND and 0 < ttl.seconds * _SECOND + ttl.nanos <= _LONGEST_TTL
    faults.need(good, field, "must be above zero and at most a hundred years")


def _labels(faults: Faults, field: str, labels: Mapping[str, str]) -> None:
    faults.need_at_most(limits.LABELS, len(labels), "entries", field)
    key_rule = f"a key must have 1 to {limits.LABEL_KEY_CHARACTERS} characters"
    value_rule = f"a value may have {limits.LABEL_VALUE_CHARACTERS} characters at most"
    for key, value in labels.items():
        name = f"{field}[{key[: limits.LABEL_KEY_CHARACTERS]!r}]"
        faults.need_within(1, limits.LABEL_KEY_CHARACTERS, len(key), "characters", name, key_rule)
        faults.need_at_most(limits.LABEL_VALUE_CHARACTERS, len(value), "characters", name, value_rule)


def _expected_revision(faults: Faults, request: convert.AnyPrime | convert.AnyExtend | pb.GenerateRequest) -> None:
    faults.need(request.expected_revision >= 0, "expected_revision", "must be 0 (no such agent) or more")


def _request_id(faults: Faults, value: str) -> None:
    faults.need_at_most(limits.REQUEST_ID_CHARACTERS, len(value), "characters", "request_id")


def _sampling(faults: Faults, sampling: pb.SamplingParams, vocab_size: int) -> None:
    def need(name: str, good: bool, rule: str) -> None:
        faults.need(good or not sampling.HasField(name), f"sampling.{name}", rule)  # type: ignore[arg-type]

    need("temperature", 0 <= sampling.temperature < math.inf, "must be 0 (greedy) or more")
    need("top_p", 0 < sampling.top_p <= 1, "must be above 0, and 1 at most")
    need("top_k", sampling.top_k >= 0, "must be 0 (off) or more")
    need("min_p", 0 <= sampling.min_p <= 1, "must be 0 (off) to 1")
    need("repetition_penalty", 0 < sampling.repetition_penalty < math.inf, "must be above 0")
    need("presence_penalty", -2 <= sampling.presence_penalty <= 2, "must be -2 to 2")
    need("frequency_penalty", -2 <= sampling.frequency_penalty <= 2, "must be -2 to 2")
    most = limits.LOGIT_BIASES
    faults.need_at_most(most, len(sampling.logit_bias), "entries", "sampling.logit_bias")
    for token, bias in sampling.logit_bias.items():
        field = f"sampling.logit_bias[{token}]"
        faults.need(0 <= token < vocab_size, field, f"is not a token of this model; ids run from 0 to {vocab_size - 1}")
        faults.need(-100 <= bias <= 100, field, "must be -100 to 100")


def _enum(faults: Faults, field: str, value: int, kind: object) -> None:
    known: list[int] = kind.values()  # type: ignore[attr-defined]
    faults.need(value in known, field, f"{value} is not a value that this server knows")
