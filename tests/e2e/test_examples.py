"""What is in examples/, as a reader would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.clients.scripted import write
from tests.e2e.harness import clean_environment, serving

LOOP = Path(__file__).parents[2] / "examples" / "agent_loop"


def test_an_agent_loop_calls_two_tools_and_computes_their_results_only(tmp_path: Path) -> None:
    write(tmp_path / "model")
    with serving(tmp_path / "data", "--model", str(tmp_path / "model")) as (server, client):
        done = subprocess.run(
            [sys.executable, LOOP / "agent_loop.py", "-target", server.address],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        held = client.get("loop").token_count
    assert done.returncode == 0, done.stderr
    first, weather, second, calculated, third, answer = done.stdout.splitlines()
    assert first.startswith("  0 tokens were there, ")
    assert weather == '  weather({"place": "Zürich"}) = {"sky": "rain", "degrees": 12}'
    assert calculated == '  calculate({"expression": "12 * 9 / 5 + 32"}) = 53.6'
    assert answer == "It has 53.6 degrees."
    there, computed = zip(
        *((int(line.split()[0]), int(line.split()[4])) for line in (first, second, third)), strict=True
    )
    answered = 3  # tokens of each answer, its end included
    assert list(there) == [0, computed[0] + answered, there[1] + computed[1] + answered]
    assert held == there[2] + computed[2] + answered
    assert max(computed[1:]) < 40
