"""A short soak finds nothing wrong on a real server, and finds what is wrong where something is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from warmkv_bench.options import ServerChoice
from warmkv_bench.soak import report, traffic
from warmkv_bench.soak.calls import ask
from warmkv_bench.soak.checks import Memory
from warmkv_bench.soak.run import Soak, run_soak

SHORT = Soak(requests=80, agents=8, seconds=60.0, concurrency=6, replays=8, tolerance=0.001, memory=1.0)
"""Too short to say anything about memory."""
BUILTIN = ServerChoice(None, ["--model", "builtin:tiny", "--hot-bytes", "4MiB", "--kv-bits", "0"])
"""Unquantised: then nothing but the last bits of 32-bit sums may differ between an answer and its replay."""


async def test_nothing_is_wrong_on_a_real_server(tmp_path: Path) -> None:
    findings = await run_soak(SHORT, BUILTIN)
    assert findings.breaches == []
    assert sum(findings.counts.values()) >= SHORT.requests
    assert findings.replays.count == SHORT.replays
    assert findings.replays.tokens > SHORT.replays
    assert findings.outcomes["given up"] > 0
    assert findings.memory
    report.write(findings, tmp_path)
    assert "nothing was wrong" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "soak.json").read_text())["breaches"] == []


async def test_a_wrong_token_and_a_lost_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client gets is falsified on the way; the server is a real one."""
    calls = 0

    async def falsified(*arguments: Any) -> Any:
        nonlocal calls
        reply = await ask(*arguments)
        calls += 1
        if calls == 1:
            reply.tokens = [2999 - token % 100 for token in reply.tokens]
        if calls == 2:
            reply.tokens.pop()
        return reply

    monkeypatch.setattr(traffic, "ask", falsified)
    monkeypatch.setattr(traffic, "WEIGHTS", {"generate": 1})
    soak = Soak(requests=12, agents=50, seconds=60.0, concurrency=1, replays=12)
    findings = await run_soak(soak, BUILTIN)
    assert any("alone is" in breach for breach in findings.breaches), "the token that was replaced"
    assert any("tokens came" in breach for breach in findings.breaches), "the token that was lost"


@pytest.mark.parametrize(("last", "expected"), [(100, 0.0), (110, 0.1)])
def test_growth_compares_the_end_with_the_end_of_the_warm_up(last: int, expected: float) -> None:
    memory = Memory(None)
    memory.series = [(float(n), 10 if n < 40 else 100 if n < 70 else last) for n in range(100)]
    assert memory.growth() == pytest.approx(expected)
