"""What is computed again of a conversation, and what is kept of one whose client leaves."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from tests.e2e.harness import chat, some_tokens, text, token_ids
from tests.gateway.harness import MODEL, Gateway, Said, Worker, eventually, running, user
from tools.gateway import AGENT_HEADER
from warmkv import v1

MANY = 100
"""Requests that leave a context each."""


def lost(front: Gateway, turns: int, begin: str, agent_id: str = "", **sampling: Any) -> list[int]:
    """Of each turn but the first, the tokens of the turn before that were computed again."""
    said: Said = []
    before, found = 0, []
    for turn in range(turns):
        said += user(f"{begin} And what about the {turn}th of them?")
        answer = front.chat(said, agent_id, max_tokens=24, **sampling)
        said.append({"role": "assistant", "content": answer.choices[0].message.content})
        found.append(before - answer.usage.prompt_tokens_details.cached_tokens)
        before = answer.usage.prompt_tokens + answer.usage.completion_tokens
    return found[1:]


@pytest.mark.parametrize("agent_id", ["", "greedy"])
def test_greedy_turns_compute_only_what_is_new(front: Gateway, agent_id: str) -> None:
    assert lost(front, 6, f"Tell me of six towns{agent_id}.", agent_id) == [0] * 5


def test_turns_by_chance_compute_only_what_is_new(front: Gateway) -> None:
    again = lost(front, 25, "Tell me of rivers.", temperature=1.0, seed=11)
    assert sum(each > 0 for each in again) <= 2, again


def test_an_agent_is_found_over_our_own_api_and_goes_on_there(front: Gateway, worker: Worker) -> None:
    answer = front.chat(user("Hello, who are you?"), "ada")
    held = worker.own.get("ada")
    assert held.token_count == answer.usage.prompt_tokens + answer.usage.completion_tokens
    more = worker.own.generate("ada", text(" And then?"))
    assert more.cache.source == v1.CACHE_SOURCE_HOT
    assert more.cache.cached_tokens >= held.token_count - 1
    assert worker.own.get("ada").token_count > held.token_count


def test_an_id_without_the_mark_is_no_agents(front: Gateway, worker: Worker) -> None:
    front.openai.chat.completions.create(
        model=MODEL, messages=user("Hello"), max_tokens=2, extra_headers={AGENT_HEADER: "bob"}
    )
    assert "bob" not in [agent.agent_id for agent in worker.own.list().agents]


def test_both_sides_make_the_same_tokens_of_a_chat(front: Gateway, worker: Worker) -> None:
    """What our side has primed is there for the gateway's tokens, all of it but the token that is computed anew."""
    corpus = (
        "Plain words, and  two   spaces.\n\n\tA tab.",
        "Züri, naïve, Ångström, e\u0301 and n\u0303 combined, ﬁ ligature",
        "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 skin, 🇨🇭",
        "日本語の文章 と 한국어 و عربي עברית",
        "<|user|> is written, <|end|> too, and <|bos|>",
        "x" * 300 + " 12345678901234567890 $%&/()=?`´^°",
        " leading and trailing ",
        "zero\u200bwidth, nbsp\u00a0here, \ufeffbom, line\u2028separator",
    )
    for number, said in enumerate(corpus):
        worker.own.generate(f"corpus-{number}", chat(("user", said)), max_tokens=1)
        usage = front.chat(user(said), max_tokens=1).usage
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1, said


class Stream:
    """A streamed chat over bare HTTP, whose bytes are looked at as they come."""

    def __init__(self, front: Gateway, said: Said, agent_id: str = "", **more: Any) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=120)
        body = {"model": MODEL, "messages": said, "stream": True, "temperature": 0} | more
        headers = {"Content-Type": "application/json"}
        if agent_id:
            headers[AGENT_HEADER] = f"agent:{agent_id}#"
        self.began = time.monotonic()
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.answered = time.monotonic() - self.began

    def until(self, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """Its lines up to one that is wanted."""
        lines = [self._response.readline()]
        while lines[-1] and not wanted(lines[-1]):
            lines.append(self._response.readline())
        return lines

    def close(self) -> None:
        sock = self._connection.sock
        self._response.close()
        self._connection.close()
        if sock is not None:
            sock.close()


def has_text(line: bytes) -> bool:
    return b'"content":"' in line and b'"content":""' not in line


def test_a_client_that_leaves_stops_its_answer_which_its_agent_keeps(front: Gateway, worker: Worker) -> None:
    stream = Stream(front, user("Tell me a long story."), "leaver", max_tokens=5000, ignore_eos=True)
    assert stream.status == 200
    for _ in range(5):
        assert has_text(stream.until(has_text)[-1])
    stream.close()
    (kept,) = eventually(lambda: [agent for agent in worker.own.list().agents if agent.agent_id == "leaver"])
    assert 15 < kept.token_count < 3000  # of 5,000 tokens, those sampled before it was known that nobody listens
    eventually(lambda: worker.own.stats().gauges.batch_size == 0)
    assert worker.own.get("leaver").token_count == kept.token_count


def test_a_long_prefill_is_answered_at_once_and_kept_alive(front: Gateway) -> None:
    said = user(" ".join(f"{number} towns" for number in range(700)))
    stream = Stream(front, said, max_tokens=2)
    assert stream.status == 200
    lines = stream.until(has_text)
    took = time.monotonic() - stream.began
    stream.close()
    if took > 5:
        assert stream.answered < took / 2
        assert any(line.startswith(b":") for line in lines), lines


def test_chats_leave_one_hidden_agent_each_for_a_while(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("hidden"), "--keep-anonymous", "20s") as (front, (worker,)):

        def hidden() -> int:
            return worker.own.stats().gauges.hidden_agents

        front.chat(user("A named one's."), "named")
        before = hidden()  # what looked whether the gateway serves
        began = time.monotonic()
        chats: list[Said] = [user(f"Number {number} begins to speak of many things.") for number in range(4)]
        for turn in range(6):
            for said in chats:
                answer = front.chat(said, max_tokens=6).choices[0].message.content
                said += [{"role": "assistant", "content": answer}, *user(f"And then, {turn}?")]
        eventually(lambda: hidden() <= before + 4)
        assert hidden() >= 4 or time.monotonic() - began > 20
        eventually(lambda: hidden() == 0)
        assert [agent.agent_id for agent in worker.own.list().agents] == ["named"]


def test_however_many_come_they_take_no_more_than_their_bytes(tmp_path: Path) -> None:
    """Asked of the worker itself, as the gateway asks it. What they begin with is another each time."""
    bound = 2 << 20
    worker = Worker(tmp_path / "data", "--keep-anonymous", "1h", "--anonymous-bytes", str(bound))
    try:
        worker.own.generate("named", token_ids(some_tokens(300)))
        channel = grpc.insecure_channel(f"127.0.0.1:{worker.port}")
        engine: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)  # type: ignore[no-untyped-call]
        most = 0
        for number in range(MANY):
            params = vllm_engine_pb2.SamplingParams(max_tokens=1, temperature=0)
            ids = vllm_engine_pb2.TokenizedInput(input_ids=some_tokens(80, seed=number + 1))
            asked = vllm_engine_pb2.GenerateRequest(tokenized=ids, sampling_params=params, request_id=str(number))
            assert len(list(engine.Generate(asked))) == 1
            if number % 10 == 9:
                most = max(most, worker.own.stats().gauges.hidden_bytes)
        eventually(lambda: worker.own.stats().gauges.hidden_bytes <= bound)
        assert bound / 2 < most < bound * 1.5
        assert worker.own.get("named").token_count > 300
    finally:
        worker.kill()
