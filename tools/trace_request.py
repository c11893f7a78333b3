"""Which files of the server one warm Generate enters before its first delta, in order.

    python tools/trace_request.py                  prints them, and how many
    python tools/trace_request.py --at-most 51     exits with 1 if there are more

A server runs in a process of its own, under a profiler in every thread. An agent is primed; then, some times over,
evicted and asked. What counts is a file of which a function runs, or goes on, between the call and the moment at which
a function of the server first returns a delta. Threads run beside each other, so now and then one is a file ahead: the
files are those of every request, and what only some entered is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import grpc

import warmkv_server
from warmkv import v1

PACKAGE = Path(warmkv_server.__file__).parent
PROMPT_TOKENS, NEW_TOKENS, ANSWER_TOKENS = 600, 16, 8
SECONDS = 120.0
AGENT = "traced"

Visits = dict[str, str]
"""Files of the package in the order of their first visit, each with the function and the thread that came."""


class Tracer:
    """A profiler's hook, which notes nothing except between `begin` and the first delta."""

    def __init__(self) -> None:
        self.visits: Visits = {}
        self._on = False

    def install(self) -> None:
        """Follow this thread, and all that are started from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    def begin(self) -> None:
        self.visits = {}
        self._on = True

    def __call__(self, frame: FrameType, event: str, value: object) -> None:
        if not self._on:
            return
        code = frame.f_code
        if (
            event == "call"
            and code.co_filename not in self.visits
            and code.co_filename.startswith(f"{PACKAGE}{os.sep}")
        ):
            self.visits[code.co_filename] = f"{code.co_qualname}, {threading.current_thread().name}"
        elif event == "return" and isinstance(value, v1.GenerateResponse) and value.HasField("delta"):
            self._on = False


def serve(data_dir: str) -> None:
    """The child's whole life: a server on a free port, and a line of JSON for each word on its standard input."""
    tracer = Tracer()

    def listen() -> None:
        for word in sys.stdin:
            if word.strip() == "begin":
                tracer.begin()
            print(json.dumps(tracer.visits), flush=True)

    threading.Thread(target=listen, daemon=True).start()
    sys.argv = ["warmkv", "serve", "--port", "0", "--data-dir", data_dir]
    from warmkv_server.main import main

    tracer.install()
    main()


class Traced:
    """A server in a process of its own, and the two words that it understands."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._line().removeprefix("listening on ")

    def begin(self) -> None:
        """Note the files from now to the first delta."""
        self._say("begin")

    def visits(self) -> Visits:
        """What was noted."""
        return cast("Visits", self._say("visits"))

    def _say(self, word: str) -> Any:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended with status {self._process.wait()}")
        return line.strip()


@contextmanager
def traced() -> Iterator[Traced]:
    """A traced server on an empty data directory; killed at the end, since nobody wants what it kept."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("WARMKV_")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--serve", folder]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=settings,
            text=True,
        )
        try:
            yield Traced(process)
        finally:
            process.kill()
            process.wait()


def warm_requests(server: Traced, times: int) -> list[Visits]:
    """The files of so many requests, each of a context that is on disk alone."""
    every = []
    with grpc.insecure_channel(server.address) as channel:
        agents = v1.AgentServiceStub(channel)
        agents.Prime(v1.PrimeRequest(agent_id=AGENT, content=_tokens(PROMPT_TOKENS)), timeout=SECONDS)
        for _ in range(times):
            agents.EvictAgent(v1.EvictAgentRequest(agent_id=AGENT), timeout=SECONDS)
            question = v1.GenerateRequest(
                agent_id=AGENT, content=_tokens(NEW_TOKENS), max_tokens=ANSWER_TOKENS, ignore_eos=True
            )
            server.begin()
            *_, last = agents.Generate(question, timeout=SECONDS)
            if last.finished.cache.source != v1.CACHE_SOURCE_WARM:
                raise SystemExit(f"the request was not warm: {last.finished.cache}")
            every.append(server.visits())
    return every


def _tokens(count: int) -> v1.Content:
    return v1.Content(token_ids=v1.TokenIds(ids=[300 + 7 * number % 1000 for number in range(count)]))


def told(every: Sequence[Visits]) -> tuple[list[str], list[str]]:
    """Lines for the files that all requests entered, in the first one's order, and for those that only some did."""
    common = set.intersection(*map(set, every))
    rest = {file: where for visits in every for file, where in visits.items() if file not in common}
    first = {file: where for file, where in every[0].items() if file in common}
    return [_line(*visit) for visit in first.items()], [_line(*visit) for visit in rest.items()]


def _line(file: str, where: str) -> str:
    return f"{Path(file).relative_to(PACKAGE).as_posix():<28} {where}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="requests (default: 5)")
    parser.add_argument("--at-most", type=int, metavar="N", help="exit with 1 if there are more files")
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return 0
    with traced() as server:
        files, sometimes = told(warm_requests(server, given.times))
    for number, line in enumerate(files, 1):
        print(f"{number:>3} {line}")
    if sometimes:
        print("\nentered by some of the requests alone:")
        print("\n".join(f"    {line}" for line in sometimes))
    print(f"\nA warm Generate enters {len(files)} files of warmkv_server before its first delta.")
    if given.at_most is not None and len(files) > given.at_most:
        print(f"That is more than {given.at_most}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
