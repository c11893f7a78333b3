"""Runs examples/ in every language, and the README's commands, against a real server. Called by `make clients`.

Needs Go, Java with Maven, and Node; builds and installs the rest into folders that git ignores. The example in Rust is
left out where there is no cargo that runs.

First all examples talk to one server at once, and each then stays silent for long enough for some pings; those that can
prime the longest context of the server, and hear nothing until it is computed. Then the server is killed with -9 and
started again, and each example talks to it once more, behind a balancer that refuses the first try of every call. The
agent loops talk to a model that calls two tools and answers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it is run as a script

from tests.clients import scripted
from tests.clients.balancer import balancer

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
GRPCURL = ROOT / "tests" / "clients" / "go"
SILENT_SECONDS = 45
"""Four pings of the examples' clients; a server that minds them has ended the connection by then."""
LONGEST = 12_288
"""Tokens of a context. To compute one takes some tens of seconds on two cores, longer than clients' keepalive."""
PRIMED = {"Go": LONGEST, "Java": LONGEST, "Node": 4096}
"""What the examples that prime are to prime; Node is told how far it is, and needs no silence. Python's has a test."""
ANSWER = re.compile(r"^\[(\w+)] reused (\d+) of (\d+) tokens, first token in [\d.,]+ s$", re.MULTILINE)

# Each example: where it is run, and its command.
CLIENTS: Mapping[str, tuple[Path, Sequence[str]]] = {
    "Python": (ROOT, (sys.executable, "examples/python/sync_client.py")),
    "Python, asyncio": (ROOT, (sys.executable, "examples/python/async_client.py")),
    "Go": (EXAMPLES / "go", ("bin/client",)),
    "Java": (EXAMPLES / "java", ("mvn", "--quiet", "--batch-mode", "exec:java")),
    "Node": (EXAMPLES / "node", ("node", "client.mjs")),
    "Rust": (EXAMPLES / "rust", ("target/debug/warmkv-rust-example",)),
}
AGENT_LOOPS: Mapping[str, Sequence[str]] = {
    "Python": (sys.executable, "agent_loop.py"),
    "Go": ("go/agentloop",),
}


def main() -> None:
    if missing := [command for command in ("go", "mvn", "npm") if not shutil.which(command)]:
        sys.exit(f"the clients need Go, Java with Maven, and Node; missing: {', '.join(missing)}")
    clients = [name for name in CLIENTS if name != "Rust" or has_rust()]
    build(rust="Rust" in clients)
    with tempfile.TemporaryDirectory() as data:
        with server(data) as address, ThreadPoolExecutor(len(clients)) as together:
            running = {name: together.submit(run, name, address, SILENT_SECONDS, PRIMED.get(name)) for name in clients}
            for name, done in running.items():
                printed = done.result()
                check(name, printed, {"COLD", "SHARED"})
                require("and still connected" in printed, name, printed, "it did not stay connected")
                if name in PRIMED:
                    require(f"primed {PRIMED[name]} tokens" in printed, name, printed, "it did not prime")
        with server(data) as address:
            for name in clients:
                with balancer(address) as (front, refused):
                    printed = run(name, front, 0)
                check(name, printed, {"WARM"})
                tried_again = {"/warmkv.v1.AgentService/Generate", "/warmkv.v1.AgentService/GetAgent"}
                require(tried_again <= refused, name, printed, f"only these were refused: {refused}")
                print(f"{name} client: answered, cancelled, refused, silent for {SILENT_SECONDS} s, tried again, warm")
    run_agent_loops()
    subprocess.run([sys.executable, ROOT / "tools" / "transcript.py", "--check"], check=True)


def has_rust() -> bool:
    """Whether there is a cargo that runs: one that picks toolchains for its user may find none."""
    runs = bool(shutil.which("cargo")) and subprocess.run(("cargo", "--version"), capture_output=True).returncode == 0
    if not runs:
        print("Rust client: left out, since no cargo runs here")
    return runs


def run_agent_loops() -> None:
    """With a model that calls two tools and answers, and with the built-in one, made to call."""
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room, "model")
        scripted.write(folder)
        run_agent_loop("It has 53.6 degrees.\n", ("--model", str(folder)))
    run_agent_loop("weather(", ("--chat-template", str(EXAMPLES / "agent_loop" / "tools.jinja")), "-force")


def run_agent_loop(expected: str, flags: tuple[str, ...], *options: str) -> None:
    with tempfile.TemporaryDirectory() as data, server(data, *flags) as address:
        for name, command in AGENT_LOOPS.items():
            done = subprocess.run(
                (*command, "-target", address, *options),
                cwd=EXAMPLES / "agent_loop",
                stdout=subprocess.PIPE,
                text=True,
                timeout=300,
                check=False,
            )
            good = done.returncode == 0 and expected in done.stdout
            require(good, f"{name} agent loop's", done.stdout, f"it didn't come to {expected!r}")
            print(f"{name} agent loop: {' '.join(('called, answered', *options))}")


def build(*, rust: bool) -> None:
    """What each language makes of an example and proto/, and grpcurl for the README."""
    plugins = ("google.golang.org/grpc/cmd/protoc-gen-go-grpc", "google.golang.org/protobuf/cmd/protoc-gen-go")
    at(GRPCURL, "go", "build", "-o", "bin/", "github.com/fullstorydev/grpcurl/cmd/grpcurl")
    at(EXAMPLES / "go", "go", "build", "-o", "bin/", *plugins)
    build_go(EXAMPLES / "go", "warmkv", "bin/client")
    build_go(EXAMPLES / "agent_loop" / "go", "agentloop", "agentloop")
    at(EXAMPLES / "node", "npm", "ci", "--silent", "--no-audit", "--no-fund")
    at(EXAMPLES / "java", "mvn", "--quiet", "--batch-mode", "compile")
    if rust:
        at(EXAMPLES / "rust", "cargo", "build", "--quiet")


def build_go(folder: Path, module: str, program: str) -> None:
    """The stubs, in a package of the module, and the program."""
    stubs = ROOT / "proto"
    protos = sorted(stubs.rglob("*.proto"))
    packages = [f"M{proto.relative_to(stubs)}={module}/v1" for proto in protos]
    options = [f"--{plugin}_opt={each}" for plugin in ("go", "go-grpc") for each in (f"module={module}", *packages)]
    generate = (sys.executable, "-m", "grpc_tools.protoc", f"-I{stubs}", "--go_out=.", "--go-grpc_out=.", *options)
    path = f"{EXAMPLES / 'go' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    at(folder, *generate, *map(str, protos), PATH=path)
    at(folder, "go", "vet", ".")
    at(folder, "go", "build", "-o", program, ".")


def at(folder: Path, *command: str, **environment: str) -> None:
    subprocess.run(command, cwd=folder, env=os.environ | environment, check=True)


def run(name: str, address: str, silent_seconds: int, primed: int | None = None) -> str:
    """What an example prints."""
    folder, command = CLIENTS[name]
    arguments = [address, str(silent_seconds), *([str(primed)] if primed else [])]
    if command[0] == "mvn":
        arguments = [f"-Dexec.args={' '.join(arguments)}"]
    done = subprocess.run(
        (*command, *arguments),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    require(done.returncode == 0, name, done.stdout, f"it ended with {done.returncode}")
    return done.stdout


def check(name: str, printed: str, first_sources: set[str]) -> None:
    """Each conversation starts from one of these sources, and goes on hot; then come a cancellation and an error."""
    answers = ANSWER.findall(printed)
    conversations = 2 if "asyncio" in name else 1
    require(len(answers) == 2 * conversations, name, printed, "it has another number of answers")
    sources = [source for source, *_ in answers]
    require(sources.count("HOT") == conversations, name, printed, "the second answer was not hot")
    require({*sources} - {"HOT"} <= first_sources, name, printed, f"the first answer was none of {first_sources}")
    require(all(int(reused) <= int(prompt) for _, reused, prompt in answers), name, printed, "it reused too much")
    cancelled = re.search(r"^cancelled after (\d+) tokens$", printed, re.MULTILINE)
    require(cancelled is not None and 8 <= int(cancelled[1]) < 10_000, name, printed, "it was not cancelled")
    error = re.search(r"^not_?found: AGENT_NOT_FOUND ", printed, re.MULTILINE | re.IGNORECASE)
    require(error is not None, name, printed, "the error has no details")


def require(condition: bool, name: str, printed: str, otherwise: str) -> None:
    if not condition:
        sys.exit(f"{name} client: {otherwise}\n{printed}")


@contextmanager
def server(data: str, *flags: str) -> Iterator[str]:
    """A server, by default on the built-in model; killed with -9 at the end."""
    command = [str(Path(sys.executable).with_name("warmkv")), "serve", "--port", "0", "--data-dir", data]
    command += flags or ["--context-limit", str(LONGEST)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.match(r"listening on (\S+)", line):
                yield found[1]
                break
        else:
            sys.exit(f"the server ended with {process.wait()} before it was serving")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
