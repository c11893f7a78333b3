"""The benchmark against the server that it is for, on the built-in model."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.bench.meddler import BreaksStreams, EvictsNothing, Meddler, PrimesNothing, SaysWarm, meddling
from warmkv import v1 as pb
from warmkv_bench.config import Isolation, MatrixConfig, Mode, State
from warmkv_bench.options import ServerChoice
from warmkv_bench.peers.cli import end_tokens
from warmkv_bench.peers.mlx_lm_process import MLXLMProcess
from warmkv_bench.peers.openai_http import mlx_lm_server
from warmkv_bench.peers.peer import Peer
from warmkv_bench.peers.side_by_side import Case, SideBySide
from warmkv_bench.peers.warmkv_peer import WarmKVPeer
from warmkv_bench.plan import Round
from warmkv_bench.prompts import Prompts
from warmkv_bench.results import Results
from warmkv_bench.run import run_matrix
from warmkv_bench.spawn import ServerFailed, ServerProcess
from warmkv_bench.terminal import Terminal
from warmkv_bench.workloads.round_robin import HEATING, RESIDENT, ROTATING, RoundRobin
from warmkv_bench.workloads.run import run_workload

MODEL = Path(__file__).parents[2] / "server" / "warmkv_server" / "models" / "tiny"
BUILTIN = ServerChoice(None, ["--model", "builtin:tiny"])
TIMEOUT_S = 120.0


def matrix(states: tuple[State, ...], isolation: Isolation, batch: int, modes: tuple[Mode, ...]) -> MatrixConfig:
    return MatrixConfig(
        contexts=(300,),
        states=states,
        modes=modes,
        runs=1,
        batch_sizes=(batch,),
        output_tokens=8,
        isolation=isolation,
        request_timeout_s=TIMEOUT_S,
    )


@pytest.mark.parametrize(
    "config",
    [
        matrix(tuple(State), Isolation.FORK, 1, tuple(Mode)),
        matrix((State.COLD, State.WARM, State.HOT), Isolation.STRICT, 2, (Mode.STREAMING,)),
    ],
    ids=["fork", "strict"],
)
async def test_every_state_is_proven(tmp_path: Path, config: MatrixConfig) -> None:
    good = await run_matrix(config, BUILTIN, tmp_path, Terminal(), resume=False, dry_run=False)
    results = Results.read(tmp_path)
    assert {sample.invalid_reason for sample in results.samples} == {None}
    assert good
    assert len(results.samples) == len(config.states) * len(config.modes) * config.batch_sizes[0]
    for row in results.memory:
        assert row["formula_bytes"] == row["reported_formula_bytes"]
        assert row["formula_bytes"] <= row["warm_bytes"] < 1.2 * row["formula_bytes"]


@pytest.mark.parametrize(
    ("kind", "caught", "why"),
    [
        (Meddler, set(), ""),
        (EvictsNothing, {State.WARM}, "source is HOT, must be WARM"),
        (PrimesNothing, {State.WARM, State.HOT}, "GetAgent returned an agent of"),
        (SaysWarm, {State.WARM, State.HOT}, "the server counted 1 requests from HOT, its replies say 0"),
        (BreaksStreams, {State.COLD, State.WARM, State.HOT}, "after 3 tokens) failed: INTERNAL: the engine failed"),
    ],
)
async def test_a_promise_broken_on_the_way_is_caught(
    tmp_path: Path, kind: type[Meddler], caught: set[State], why: str
) -> None:
    config = matrix((State.COLD, State.WARM, State.HOT), Isolation.FORK, 1, (Mode.STREAMING,))
    async with ServerProcess(["--model", "builtin:tiny"]) as process, meddling(kind, process.address) as address:
        server = ServerChoice(address, None)
        good = await run_matrix(config, server, tmp_path, Terminal(), resume=False, dry_run=False)
    assert good == (not caught)
    invalid = Results.read(tmp_path).invalid
    assert {sample.state for sample in invalid} == caught
    for sample in invalid:
        assert why in (sample.invalid_reason or "")


class Killer(Terminal):
    """Kills the server when the first round begins."""

    def __init__(self, process: ServerProcess) -> None:
        super().__init__()
        self._process = process

    def begins(self, round_: Round, remaining_s: float) -> None:
        super().begins(round_, remaining_s)
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)


async def test_a_server_that_dies_gives_no_samples(tmp_path: Path) -> None:
    config = matrix((State.COLD, State.WARM), Isolation.FORK, 1, (Mode.STREAMING,))
    async with ServerProcess(["--model", "builtin:tiny"]) as process:
        target = ServerChoice(process.address, None)

        good = await run_matrix(config, target, tmp_path, Killer(process), resume=False, dry_run=False)
    assert not good
    results = Results.read(tmp_path)
    assert len(results.samples) == 2
    for sample in results.samples:
        assert sample.invalid_reason is not None
        assert "UNAVAILABLE" in sample.invalid_reason


async def test_a_model_that_is_not_there_is_one_error() -> None:
    with pytest.raises(ServerFailed, match="ended with status 2"):
        async with ServerProcess(["--model", "/nowhere/at/all"]):
            pass


async def test_round_robin_keeps_as_many_agents_in_ram_as_it_was_told() -> None:
    workload = RoundRobin(4, 2, 512, laps=1, concurrency=1, suffix_tokens=8, output_tokens=4)
    async with BUILTIN.connected(TIMEOUT_S) as target:
        hot_bytes = await workload.hot_bytes(target.client, await Prompts.of_server(target.client, 0))
    server = ServerChoice(None, ["--model", "builtin:tiny", "--hot-bytes", str(hot_bytes)])
    async with server.connected(TIMEOUT_S) as target:
        result = await run_workload("round-robin", workload, {}, target, server, 0)
    assert result.problems == []
    assert result.figures["resident_hot_share"] == 1
    assert result.figures["rotating_warm_share"] == 1
    assert [turn.phase for turn in result.turns] == [HEATING] * 2 + [RESIDENT] * 4 + [ROTATING] * 4


async def test_peers_answer_the_same_questions() -> None:
    warmkv = WarmKVPeer(MODEL, TIMEOUT_S)
    peers: list[Peer] = [
        warmkv,
        MLXLMProcess(sys.executable, MODEL, None),
        mlx_lm_server(sys.executable, MODEL, end_tokens(MODEL), None, TIMEOUT_S),
    ]

    async def count_tokens(text: str) -> int:
        assert warmkv.client is not None
        return await warmkv.client.count_tokens(pb.Content(text=text))

    try:
        for peer in peers:
            await peer.start()
        samples = await SideBySide((64,), runs=1, output_tokens=8, seed=0).run(peers, count_tokens, lambda _: None)
    finally:
        for peer in peers:
            await peer.close()
    assert [sample.error for sample in samples] == [None] * 9
    reused = {(sample.peer, sample.case): sample.cached_tokens or 0 for sample in samples}
    for peer in peers:
        assert reused[peer.name, Case.COLD] < 8 < 48 < reused[peer.name, Case.AGAIN]
    assert reused["warmkv", Case.RESTARTED] > 48
    assert reused["mlx_lm.server", Case.RESTARTED] < 8
