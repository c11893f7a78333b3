"""The workloads' own arithmetic, and what they send."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.scripted import Bug, ScriptedServer, serving
from warmkv_bench.config import ConfigError
from warmkv_bench.options import ServerChoice
from warmkv_bench.prompts import Prompts
from warmkv_bench.workloads.conversation import Conversation, Loop, arrivals_ms
from warmkv_bench.workloads.replay import Replay, prompt_of
from warmkv_bench.workloads.round_robin import RoundRobin
from warmkv_bench.workloads.run import Workload, run_workload, write
from warmkv_bench.workloads.trace import Sessions, TraceError, TraceRequest, ideal_cached_tokens, read_trace
from warmkv_bench.workloads.turns import WorkloadResult

PROMPTS = Prompts(range(300, 1300), seed=0)


def request(tokens: int, *hash_ids: int, due_ms: float = 0.0) -> TraceRequest:
    return TraceRequest(due_ms, tokens, 2, hash_ids, block_tokens=8)


async def run(workload: Workload, bug: Bug = Bug.NONE) -> WorkloadResult:
    async with serving(ScriptedServer(bug)) as address:
        server = ServerChoice(address, None)
        async with server.connected(120.0) as target:
            return await run_workload("test", workload, {}, target, server, 0)


def test_a_trace_is_read_in_the_order_of_its_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 2000, "input_length": 600, "output_length": 10, "hash_ids": [1, 2]},
        {"timestamp": 1000, "input_length": 512, "output_length": 4, "hash_ids": [1]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert [one.input_tokens for one in read_trace(path, None, 1.0, 1.0)] == [512, 600]
    (scaled,) = read_trace(path, 1, 0.5, 0.25)
    assert scaled == TraceRequest(500.0, 128, 1, (1,), block_tokens=128)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "{}",
        '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 100, "output_length": -1, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 100, "output_length": 1, "hash_ids": []}',
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TraceError, match="line 1"):
        read_trace(path, None, 1.0, 1.0)


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    """Traces with few hash ids, so that prefixes repeat."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
        found.append(request(draw(st.integers((len(ids) - 1) * 8 + 1, len(ids) * 8)), *ids))
    return found


@given(traces())
def test_the_ideal_is_the_longest_common_prefix_of_the_prompts_themselves(trace: list[TraceRequest]) -> None:
    prompts = [prompt_of(one, PROMPTS) for one in trace]
    for index, (prompt, cached) in enumerate(zip(prompts, ideal_cached_tokens(trace), strict=True)):
        longest = 0
        for earlier in prompts[:index]:
            same = 0
            while same < min(len(prompt), len(earlier)) and prompt[same] == earlier[same]:
                same += 1
            longest = max(longest, same)
        assert cached == min(longest, len(prompt) - 1)


def test_a_session_goes_on_while_its_full_blocks_stay() -> None:
    sessions = Sessions()
    assert sessions.assign([1, 2, 3]) == 0
    assert sessions.assign([7, 8]) == 1
    assert sessions.assign([1, 2, 4, 5]) == 0
    assert sessions.assign([1, 2, 6]) == 2  # the session that held 1, 2 holds 1, 2, 4 now
    assert sessions.assign([7, 9, 10]) == 1


async def test_a_replay_without_loss_reaches_the_ideal() -> None:
    trace = [request(20, 1, 2, 3), request(12, 7, 8), request(30, 1, 2, 4, 5, due_ms=20.0)]
    result = await run(Replay(trace, context_limit=1000))
    assert result.problems == []
    assert result.figures["hit_ratio"] == result.figures["ideal_hit_ratio"] == pytest.approx(16 / 62)
    assert result.figures["sessions"] == 2


async def test_what_does_not_fit_is_left_out_and_counted() -> None:
    result = await run(Replay([request(20, 1, 2, 3), request(12, 7, 8)], context_limit=16))
    assert (result.figures["requests"], result.figures["left_out"]) == (1, 1)


def conversation(loop: Loop) -> Conversation:
    return Conversation(2, 3, 64, 16, 8, loop, think_s=0.001, rate_per_s=500.0, seed=0)


@pytest.mark.parametrize("loop", Loop)
async def test_conversations_keep_what_they_said(loop: Loop, tmp_path: Path) -> None:
    result = await run(conversation(loop))
    assert result.problems == []
    for agent in ("bench.conversation.0", "bench.conversation.1"):
        turns = sorted((turn for turn in result.turns if turn.agent_id == agent), key=lambda turn: turn.sent_ms)
        assert [turn.prompt_tokens for turn in turns] == [64, 64 + 8 + 16, 64 + 2 * (8 + 16)]
        assert [turn.cached_tokens for turn in turns] == [0, 64 + 8, 64 + 8 + 16 + 8]
    write(result, tmp_path)
    assert json.loads((tmp_path / "workload.json").read_text())["summary"]["requests"] == 6
    assert "hit ratio" in (tmp_path / "report.md").read_text()


async def test_an_open_loop_counts_latency_from_when_a_turn_was_due() -> None:
    result = await run(conversation(Loop.OPEN))
    for turn in result.turns:
        assert turn.latency_ms is not None
        assert turn.ttft_ms is not None
        assert turn.latency_ms == pytest.approx(turn.ttft_ms + turn.sent_ms - turn.scheduled_ms)


def test_arrivals_have_the_rate_that_was_asked_for() -> None:
    times = arrivals_ms(4000, 20.0, seed=3)
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(50.0, rel=0.1)


async def test_a_failed_request_fails_the_workload() -> None:
    result = await run(conversation(Loop.CLOSED), Bug.BREAKS)
    assert "6 of 6 requests failed" in result.problems[0]


async def test_counters_that_disagree_fail_the_workload() -> None:
    result = await run(conversation(Loop.CLOSED), Bug.COUNTS_NOTHING)
    assert "the server counted 0 requests from COLD, its replies say 2" in result.problems


def test_round_robin_needs_more_agents_than_fit() -> None:
    with pytest.raises(ConfigError, match="--resident is 4"):
        RoundRobin(4, 4, 64, 1, 1, 16, 8)
