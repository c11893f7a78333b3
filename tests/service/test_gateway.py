"""A gateway's requests as ours, and our answers as its: real messages of its contract."""

from __future__ import annotations

import hashlib
import io
import zipfile
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from warmkv_server.agents.stages import Stages
from warmkv_server.agents.types import (
    CacheReport,
    CandidateDelta,
    CandidateFinished,
    GenerateFinished,
    GenerateRequest,
    GenerateStarted,
    Timings,
)
from warmkv_server.contract.content import TokenContent
from warmkv_server.contract.generation import Delta, Finish, Logprobs, Sampling
from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.contract.kv import Source
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.store import HeldChange, HeldSnapshot
from warmkv_server.errors import ContextTooLong, InvalidField
from warmkv_server.service import wire
from warmkv_server.service.gateway import asked, bundle, kv_events
from warmkv_server.service.gateway.answered import Answered
from warmkv_server.service.validate import Model

MODEL = Model(vocab_size=4096, context_limit=1000)
DEFAULTS = Sampling(temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1)
IDS = [5, 6, 7]


def request(
    agent_id: str = "", *, ids: list[int] | None = None, params: dict[str, Any] | None = None, **more: Any
) -> Any:
    message = vllm.GenerateRequest(
        tokenized=vllm.TokenizedInput(original_text="five six", input_ids=IDS if ids is None else ids),
        sampling_params=vllm.SamplingParams(**(params or {})),
        **more,
    )
    return asked.generate_request(message, AgentKey("t", agent_id), Stages(), DEFAULTS, MODEL)


def refused(**more: Any) -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        request(**more)
    return caught.value


def test_what_is_unset_is_off_and_the_temperature_the_models() -> None:
    found = request()
    assert found.content == TokenContent((5, 6, 7))
    assert found.replace
    assert found.whole
    assert not found.told_apart
    assert found.candidates == 0
    assert found.splice
    assert found.answer.sampling == Sampling(temperature=0.7)
    assert found.answer.max_tokens == MODEL.context_limit  # and the engine stops where the context is full
    assert found.answer.grammar is None
    assert found.answer.top_logprobs == 0


def test_every_setting_arrives() -> None:
    params = {
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {7: 2.5},
        "seed": -1,
        "max_tokens": 9,
        "stop": ["x", "yy"],
        "stop_token_ids": [11, 12],
        "n": 3,
        "logprobs": 4,
    }
    answer = (found := request(params=params, stream=True)).answer
    assert answer.sampling == Sampling(0.0, 0.5, 3, 0.25, 1.5, 0.5, -0.5, {7: 2.5}, 2**64 - 1)
    assert (answer.max_tokens, answer.stop, answer.stop_tokens) == (9, ("x", "yy"), {11, 12})
    assert (found.candidates, answer.top_logprobs, found.whole) == (3, 4, False)


def test_the_values_that_mean_off() -> None:
    sampling = request(params={"top_p": 1.0, "top_k": 2**32 - 1, "seed": 5}).answer.sampling
    assert (sampling.top_p, sampling.top_k, sampling.seed) == (1.0, 0, 5)
    assert request(params={"logprobs": 0}).answer.top_logprobs == 1  # of which the alternatives aren't told
    assert request(params={"ignore_eos": True}).answer.ignore_eos


@pytest.mark.parametrize(
    ("params", "grammar"),
    [
        ({"json_schema": "{}"}, Grammar(GrammarKind.JSON_SCHEMA, ("{}",), "sampling_params.json_schema")),
        (
            {"json_object": True},
            Grammar(GrammarKind.JSON_SCHEMA, ('{"type": "object"}',), "sampling_params.json_object"),
        ),
        ({"regex": "a+"}, Grammar(GrammarKind.REGEX, ("a+",), "sampling_params.regex")),
        ({"grammar": 'root ::= "a"'}, Grammar(GrammarKind.GBNF, ('root ::= "a"',), "sampling_params.grammar")),
        (
            {"choice": vllm.ChoiceConstraint(choices=["a", "b"])},
            Grammar(GrammarKind.CHOICES, ("a", "b"), "sampling_params.choice.choices"),
        ),
    ],
)
def test_constraints(params: dict[str, Any], grammar: Grammar) -> None:
    assert request(params=params).answer.grammar == grammar


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("kv_transfer_params", {"kv_transfer_params": vllm.KvTransferParams()}),
        ("kv_transfer_params_json", {"kv_transfer_params_json": "{}"}),
        ("data_parallel_rank", {"data_parallel_rank": 0}),
        ("mm_inputs", {"mm_inputs": vllm.MultimodalInputs()}),
        ("extra_mm_inputs", {"extra_mm_inputs": [vllm.MultimodalInputs()]}),
        ("media_refs", {"media_refs": vllm.MediaRefs()}),
        ("tokenized.input_ids", {"ids": []}),
        ("tokenized.input_ids[1]", {"ids": [5, 4096]}),
        ("tokenized.input_ids[0]", {"ids": [2**32 - 1]}),
        ("sampling_params.prompt_logprobs", {"params": {"prompt_logprobs": 0}}),
        ("sampling_params.truncate_prompt_tokens", {"params": {"truncate_prompt_tokens": 3}}),
        ("sampling_params.structural_tag", {"params": {"structural_tag": "{}"}}),
        ("sampling_params.min_tokens", {"params": {"min_tokens": 1}}),
        ("sampling_params.max_tokens", {"params": {"max_tokens": 0}}),
        ("sampling_params.logprobs", {"params": {"logprobs": -1}}),
        ("sampling_params.logprobs", {"params": {"logprobs": 21}}),
        ("sampling_params.n", {"params": {"n": 17}}),
        ("sampling_params.n", {"agent_id": "ada", "params": {"n": 2}}),
        ("sampling_params.json_object", {"params": {"json_object": False}}),
        ("sampling_params.ignore_eos", {"params": {"ignore_eos": True, "regex": "a"}}),
        ("sampling_params.choice.choices", {"params": {"choice": vllm.ChoiceConstraint()}}),
        ("sampling_params.temperature", {"params": {"temperature": -1.0}}),
        ("sampling_params.top_p", {"params": {"top_p": 2.0}}),
        ("sampling_params.presence_penalty", {"params": {"presence_penalty": 3.0}}),
        ("sampling_params.logit_bias[5000]", {"params": {"logit_bias": {5000: 1.0}}}),
        ("sampling_params.stop[0]", {"params": {"stop": [""]}}),
        ("sampling_params.stop", {"params": {"stop": ["x"] * 17}}),
    ],
)
def test_what_is_refused_is_named(field: str, more: dict[str, Any]) -> None:
    error = refused(**more)
    assert [violation.field for violation in error.violations] == [field]
    assert field in str(error)


def test_text_and_what_is_too_long() -> None:
    with pytest.raises(InvalidField, match=r"^text can't be taken; give tokenized.input_ids$"):
        asked.generate_request(vllm.GenerateRequest(text="x"), AgentKey("", ""), Stages(), DEFAULTS, MODEL)
    with pytest.raises(ContextTooLong):
        request(ids=[1] * 1001)


@pytest.mark.parametrize(
    ("request_id", "agent_id"),
    [
        ("agent:ada#-0190", "ada"),
        ("agent:ada#", "ada"),
        ("agent:team:a.b-c#-p0-01", "team:a.b-c"),
        ("ada-0190", ""),
        ("chatcmpl-agent:ada#", ""),
        ("", ""),
    ],
)
def test_only_a_marked_id_names_an_agent(request_id: str, agent_id: str) -> None:
    assert asked.agent_id(request_id) == agent_id


@pytest.mark.parametrize("request_id", ["agent:ada-0190", "agent:#x", "agent:a b#x", f"agent:{'a' * 129}#x"])
def test_a_marked_id_that_names_none_is_refused(request_id: str) -> None:
    with pytest.raises(InvalidField, match="request_id"):
        asked.agent_id(request_id)


CACHE = CacheReport(Source.HOT, prompt_tokens=10, hot_tokens=8)


def finished(**more: Any) -> GenerateFinished:
    told: dict[str, Any] = {"finish": Finish.STOP, "matched_stop": "", "completion_tokens": 2} | more
    return GenerateFinished(**told, cache=CACHE, timings=Timings(), agent=None, persisted=False)


def logprobs(token: int) -> Logprobs:
    return Logprobs(token, -0.5, ((token, -0.5), (9, -2.0)))


def messages(wanted: GenerateRequest, *events: Any, own: bool = False) -> list[vllm.GenerateResponse]:
    answered = Answered(wanted, own, frozenset({1}))
    return [message for event in (GenerateStarted("", CACHE), *events) for message in answered.messages(event)]


def test_an_answer_in_pieces() -> None:
    wanted = request(params={"logprobs": 2}, stream=True)
    deltas = Delta((5,), "a", (logprobs(5),)), Delta((), "b"), Delta((1,), "", (logprobs(1),))
    first, second, last = messages(wanted, *deltas, finished())
    assert (list(first.chunk.token_ids), list(second.chunk.token_ids)) == ([5], [1])
    assert (first.chunk.prompt_tokens, first.chunk.cached_tokens, second.chunk.completion_tokens) == (10, 8, 2)
    assert list(first.chunk.output_logprobs.top_logprobs[0].token_ids) == [5, 9]
    end = last.complete
    assert (list(end.output_ids), end.finish_reason, end.completion_tokens, end.cached_tokens) == ([5, 1], "stop", 2, 8)
    assert end.WhichOneof("matched_stop") is None  # the end of the sequence, which nobody asked for
    assert list(end.output_logprobs.token_logprobs) == [-0.5, -0.5]


def test_an_answer_as_a_whole() -> None:
    (end,) = messages(request(params={"logprobs": 0}), Delta((5, 6), "ab", (logprobs(5),)), finished(), own=True)
    assert list(end.complete.output_ids) == [5, 6]
    assert list(end.complete.output_logprobs.token_ids) == [5]
    assert not end.complete.output_logprobs.top_logprobs


def test_what_stopped_it_is_told_if_it_was_asked_for() -> None:
    wanted = request(params={"stop_token_ids": [6]})
    (end,) = messages(wanted, Delta((5, 6), ""), finished())
    assert end.complete.matched_token_id == 6
    (end,) = messages(wanted, Delta((5, 7, 8), ""), finished(finish=Finish.STOP_SEQUENCE, matched_stop="x"))
    assert (list(end.complete.output_ids), end.complete.matched_stop_str) == ([5, 7], "x")
    (end,) = messages(wanted, Delta((5, 6), ""), finished(finish=Finish.LENGTH))
    assert (end.complete.finish_reason, end.complete.WhichOneof("matched_stop")) == ("length", None)


def test_several_answers_end_one_by_one() -> None:
    wanted = request(params={"n": 2}, stream=True)
    ends = tuple(CandidateFinished(Finish.LENGTH, "", n, 0.0, None) for n in (2, 1))
    deltas = [CandidateDelta(n, Delta((token,), "")) for n, token in ((0, 5), (1, 6), (0, 7))]
    found = messages(wanted, *deltas, finished(candidates=ends))
    assert [(each.chunk.index, list(each.chunk.token_ids)) for each in found[:3]] == [(0, [5]), (1, [6]), (0, [7])]
    assert [(each.complete.index, list(each.complete.output_ids)) for each in found[3:]] == [(0, [5, 7]), (1, [6])]


def test_a_tokenizer_travels_in_pieces_with_its_digest() -> None:
    files = {"tokenizer.json": bytes(range(256)) * 10, "big": hashlib.shake_256(b"").digest(3 << 20)}
    chunks = list(bundle.chunks(packed := bundle.archive(files)))
    assert len(chunks) == 4
    assert [bool(chunk.sha256) for chunk in chunks] == [False, False, False, True]
    joined = b"".join(chunk.data for chunk in chunks)
    assert hashlib.sha256(joined).hexdigest() == chunks[-1].sha256
    with zipfile.ZipFile(io.BytesIO(joined)) as found:
        assert {name: found.read(name) for name in found.namelist()} == files
    assert packed == bundle.archive(dict(reversed(files.items())))


def test_many_ids_and_the_text_they_are_of_are_no_long_string() -> None:
    many = vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[300] * 100_000, original_text="x" * 400_000))
    assert wire.refusal(many.SerializeToString(), vllm.GenerateRequest, text_bytes=1_000_000) is None
    long = wire.refusal(many.SerializeToString(), vllm.GenerateRequest, text_bytes=300_000)
    assert isinstance(long, ContextTooLong)
    regex = vllm.GenerateRequest(sampling_params=vllm.SamplingParams(regex="x" * 70_000))
    assert "sampling_params.regex" in str(wire.refusal(regex.SerializeToString(), vllm.GenerateRequest))
    flood = vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1] * 2_200_000))
    assert "tokenized.input_ids" in str(wire.refusal(flood.SerializeToString(), vllm.GenerateRequest))


def tokens(*ids: int) -> Any:
    return np.array(ids, np.int32)


def told(events: Any) -> list[tuple[str, int]]:
    """What kinds of events there are, and of how many blocks."""
    sizes = {"stored": "blocks", "removed": "block_hashes", "cleared": "DESCRIPTOR"}
    found = [(kind := event.WhichOneof("data"), getattr(getattr(event, kind), sizes[kind])) for event in events]
    return [(kind, 0 if kind == "cleared" else len(each)) for kind, each in found]


def test_blocks_are_there_as_long_as_a_context_has_them() -> None:
    long, branch = tokens(*range(200)), tokens(*range(130), *range(500, 570))
    blocks = kv_events.Blocks()
    assert told(blocks.snapshot(HeldSnapshot({1: long}))) == [("cleared", 0), ("stored", 3)]
    assert told(blocks.change(HeldChange(2, tokens(), branch))) == [("stored", 1)]
    assert told(blocks.change(HeldChange(3, tokens(), long))) == []
    assert told(blocks.change(HeldChange(1, long, long[:100]))) == []
    assert told(blocks.change(HeldChange(3, long, tokens()))) == [("removed", 1)]
    assert told(blocks.change(HeldChange(2, branch, tokens(*range(900, 1000))))) == [("stored", 1), ("removed", 2)]
    assert told(blocks.change(HeldChange(1, long[:100], long))) == [("stored", 2)]
    assert told(blocks.change(HeldChange(4, tokens(), tokens(*range(63))))) == []


def test_a_long_context_is_told_in_events_of_few_blocks_each_behind_its_parent() -> None:
    long = tokens(*range(64 * 600))
    stored = [event.stored for event in kv_events.Blocks().change(HeldChange(1, tokens(), long))]
    assert [len(each.blocks) for each in stored] == [256, 256, 88]
    assert not stored[0].HasField("parent_block_hash")
    for before, after in pairwise(stored):
        assert after.parent_block_hash == before.blocks[-1].block_hash
    assert [token for each in stored for block in each.blocks for token in block.token_ids] == long.tolist()
