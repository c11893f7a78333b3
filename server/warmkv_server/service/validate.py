"""Whether a request makes sense by itself: every wrong field of it, at once.

What depends on the agent or on the tokenizer is checked where that is known, at the agent's turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration

from warmkv.v1 import agent_service_pb2 as pb
from warmkv.v1 import server_service_pb2 as server_pb
from warmkv_server.errors import EmptyContent, InvalidField, Violation

AGENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
AGENT_ID_RULE = "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"
_SECOND = 1_000_000_000
_LONGEST_TTL = 100 * 365 * 86400 * _SECOND
"""Nanoseconds. Later than that, times run out of what a Timestamp can hold."""
_UPDATABLE = ("pinned", "ttl", "labels")


class Faults:
    """The wrong fields of one request."""

    def __init__(self) -> None:
        self._found: list[Violation] = []
        self._empty: list[Violation] = []

    def need(self, good: bool, field: str, description: str) -> None:
        """Note that a field is wrong, and what it must be, unless it is good."""
        if not good:
            self._found.append(Violation(field, description))

    def need_content(self, present: bool) -> None:
        if not present:
            self._empty.append(Violation("content", "must not be empty: give text, token_ids or chat"))

    def refuse(self) -> None:
        """Raise if anything is wrong.

        Raises:
            InvalidField, or EmptyContent if that is all.
        """
        if self._found:
            found = [*self._found, *self._empty]
            raise InvalidField("; ".join(f"{v.field} {v.description}" for v in found), violations=found)
        if self._empty:
            raise EmptyContent("content must not be empty: give text, token_ids or chat", violations=self._empty)


def prime(request: pb.PrimeRequest, vocab_size: int) -> None:
    faults = Faults()
    _agent_id(faults, "agent_id", request.agent_id)
    _content(faults, request.content, vocab_size)
    faults.need_content(_is_given(request.content))
    if request.HasField("ttl"):
        _ttl(faults, "ttl", request.ttl)
    _labels(faults, "labels", request.labels)
    _expected_revision(faults, request)
    _request_id(faults, request.request_id)
    faults.refuse()


def extend(request: pb.ExtendRequest, vocab_size: int) -> None:
    faults = Faults()
    _agent_id(faults, "agent_id", request.agent_id)
    _content(faults, request.content, vocab_size)
    faults.need_content(_is_given(request.content))
    _expected_revision(faults, request)
    _request_id(faults, request.request_id)
    faults.refuse()


def generate(request: pb.GenerateRequest, vocab_size: int) -> None:
    faults = Faults()
    if request.agent_id:
        _agent_id(faults, "agent_id", request.agent_id)
    else:
        unset = not request.HasField("expected_revision")
        faults.need(unset, "expected_revision", "needs an agent_id")
        faults.need_content(_is_given(request.content))
    _enum(faults, "context_mode", request.context_mode, pb.ContextMode)
    _enum(faults, "stream_mode", request.stream_mode, pb.StreamMode)
    _content(faults, request.content, vocab_size)
    if request.agent_id and request.context_mode == pb.CONTEXT_MODE_REPLACE:
        faults.need_content(_is_given(request.content))
    _sampling(faults, request.sampling, vocab_size)
    faults.need(request.max_tokens >= 0, "max_tokens", "must be 0 (the server's default) or more")
    faults.need(len(request.stop) <= 16, "stop", "may have 16 strings at most")
    for number, stop in enumerate(request.stop):
        faults.need(bool(stop), f"stop[{number}]", "must not be empty")
    faults.need(0 <= request.top_logprobs <= min(20, vocab_size), "top_logprobs", "must be 0 to 20")
    _expected_revision(faults, request)
    _request_id(faults, request.request_id)
    if request.request_id:
        faults.need(not request.ephemeral, "request_id", "can't be kept for an ephemeral request")
        faults.need(bool(request.agent_id), "request_id", "needs an agent_id")
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
    faults.refuse()


def update(request: pb.UpdateAgentRequest) -> None:
    faults = Faults()
    _agent_id(faults, "agent.agent_id", request.agent.agent_id)
    paths = request.update_mask.paths
    known = [path for path in paths if path in _UPDATABLE]
    faults.need(bool(paths), "update_mask", "must name at least one of pinned, ttl, labels")
    faults.need(len(known) == len(paths), "update_mask", "may name pinned, ttl and labels only")
    if "ttl" in known and request.agent.HasField("ttl"):
        _ttl(faults, "agent.ttl", request.agent.ttl)
    if "labels" in known:
        _labels(faults, "agent.labels", request.agent.labels)
    faults.refuse()


def count_tokens(request: server_pb.CountTokensRequest, vocab_size: int) -> None:
    faults = Faults()
    if request.agent_id:
        _agent_id(faults, "agent_id", request.agent_id)
    _enum(faults, "context_mode", request.context_mode, pb.ContextMode)
    _content(faults, request.content, vocab_size)
    faults.need_content(_is_given(request.content))
    faults.refuse()


def _agent_id(faults: Faults, field: str, value: str) -> None:
    faults.need(AGENT_ID.fullmatch(value) is not None, field, AGENT_ID_RULE)


def _is_given(content: pb.Content) -> bool:
    return bool(content.text or content.token_ids.ids or content.chat.messages)


def _content(faults: Faults, content: pb.Content, vocab_size: int) -> None:
    ids = content.token_ids.ids
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        for number, token in enumerate(ids):
            rule = f"{token} is not a token of this model; ids run from 0 to {vocab_size - 1}"
            faults.need(0 <= token < vocab_size, f"content.token_ids.ids[{number}]", rule)
    for number, message in enumerate(content.chat.messages):
        faults.need(bool(message.role), f"content.chat.messages[{number}].role", "must not be empty")


def _ttl(faults: Faults, field: str, ttl: Duration) -> None:
    good = 0 <= ttl.nanos < _SECOND and 0 < ttl.seconds * _SECOND + ttl.nanos <= _LONGEST_TTL
    faults.need(good, field, "must be above zero and at most a hundred years")


def _labels(faults: Faults, field: str, labels: Mapping[str, str]) -> None:
    faults.need(len(labels) <= 64, field, "may have 64 entries at most")
    for key, value in labels.items():
        faults.need(1 <= len(key) <= 63, f"{field}[{key!r}]", "a key must have 1 to 63 characters")
        faults.need(len(value) <= 255, f"{field}[{key!r}]", "a value may have 255 characters at most")


def _expected_revision(faults: Faults, request: pb.PrimeRequest | pb.ExtendRequest | pb.GenerateRequest) -> None:
    faults.need(request.expected_revision >= 0, "expected_revision", "must be 0 (no such agent) or more")


def _request_id(faults: Faults, value: str) -> None:
    faults.need(len(value) <= 128, "request_id", "may have 128 characters at most")


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
    for token, bias in sampling.logit_bias.items():
        field = f"sampling.logit_bias[{token}]"
        faults.need(0 <= token < vocab_size, field, f"is not a token of this model; ids run from 0 to {vocab_size - 1}")
        faults.need(-100 <= bias <= 100, field, "must be -100 to 100")


def _enum(faults: Faults, field: str, value: int, kind: object) -> None:
    known: list[int] = kind.values()  # type: ignore[attr-defined]
    faults.need(value in known, field, f"{value} is not a value that this server knows")
