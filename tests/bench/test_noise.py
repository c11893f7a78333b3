"""Whoever reads a result must see when it came from random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.bench.matrices import measured
from tests.bench.scripted import ScriptedServer, serving
from warmkv import v1 as pb
from warmkv_bench.cli import app
from warmkv_bench.options import ServerChoice
from warmkv_bench.terminal import Terminal
from warmkv_bench.workloads.replay import Replay
from warmkv_bench.workloads.run import run_workload, show, write
from warmkv_bench.workloads.trace import TraceRequest

LABEL = "scripted is noise"
KINDS = pytest.mark.parametrize(("kind", "said"), [(pb.MODEL_KIND_RANDOM, True), (pb.MODEL_KIND_BUILTIN, False)])


def server(kind: pb.ModelKind.ValueType) -> ScriptedServer:
    servicer = ScriptedServer()
    servicer.model_kind = kind
    return servicer


@KINDS
async def test_a_matrix_says_so_everywhere(
    kind: pb.ModelKind.ValueType, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await measured(tmp_path, servicer=server(kind), contexts=(64,))
    shown = capsys.readouterr().out
    compared = CliRunner().invoke(app, ["compare", str(tmp_path), str(tmp_path)]).output
    for text in ((tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text(), shown, compared):
        assert (LABEL in text) == said


@KINDS
async def test_a_workload_says_so_too(
    kind: pb.ModelKind.ValueType, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(server(kind)) as address:
        choice = ServerChoice(address, None)
        async with choice.connected(120.0) as target:
            workload = Replay([TraceRequest(0.0, 20, 2, (1, 2, 3), block_tokens=8)], context_limit=100)
            result = await run_workload("test", workload, {}, target, choice, 0)
    write(result, tmp_path)
    show(result, Terminal(), tmp_path)
    assert (LABEL in (tmp_path / "report.md").read_text()) == said
    assert (LABEL in capsys.readouterr().out) == said
