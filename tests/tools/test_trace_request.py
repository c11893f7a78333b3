"""Counting the files of a request: the tracer here, and the tool as it is run, on a real server."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

from tools.trace_request import PACKAGE, Tracer, told
from warmkv import v1
from warmkv_server.service import validate

ROOT = Path(__file__).parents[2]
VALIDATE = str(PACKAGE / "service/validate.py")


def in_a_traced_thread(tracer: Tracer, *steps: object) -> None:
    def run() -> None:
        for step in steps:
            assert callable(step)
            step()

    previous = threading.getprofile()
    threading.setprofile(tracer)
    try:
        thread = threading.Thread(target=run, name="traced")
        thread.start()
        thread.join()
    finally:
        threading.setprofile(previous)


def check_id() -> None:
    validate.agent_id("ada")


def first_delta() -> v1.GenerateResponse:
    return v1.GenerateResponse(delta=v1.GenerateDelta(text="a"))


def start() -> v1.GenerateResponse:
    return v1.GenerateResponse(started=v1.GenerateStarted())


def test_files_are_noted_from_the_beginning_to_the_first_delta() -> None:
    tracer = Tracer()
    in_a_traced_thread(tracer, check_id)
    assert tracer.visits == {}
    in_a_traced_thread(tracer, tracer.begin, start, check_id)
    assert tracer.visits == {VALIDATE: "agent_id, traced"}
    in_a_traced_thread(tracer, tracer.begin, first_delta, check_id)
    assert tracer.visits == {}


def test_what_only_some_requests_entered_is_told_apart() -> None:
    files = {name: str(PACKAGE / name) for name in ("app.py", "cli.py", "config.py")}
    every = [{files["cli.py"]: "a", files["app.py"]: "b"}, {files["app.py"]: "b", files["config.py"]: "c"}]
    common, rest = told(every)
    assert [line.split()[0] for line in common] == ["app.py"]
    assert sorted(line.split()[0] for line in rest) == ["cli.py", "config.py"]


def test_a_warm_request_goes_through_service_agents_engine_and_store() -> None:
    command = [sys.executable, "tools/trace_request.py", "--times", "2", "--at-most", "1"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1, outcome.stderr
    assert outcome.stderr == "That is more than 1.\n"
    rooms = set(re.findall(r"^ +\d+ (\w+)/", outcome.stdout, re.MULTILINE))
    assert {"service", "agents", "engine", "kv"} <= rooms
