"""Runs clients of other languages, and the README's commands, against a real server. Called by `make clients`.

Needs Go, Node, and Java with Maven; builds and installs the rest into folders that git ignores.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TOOLS = HERE / "go" / "bin"
AGENT_LOOP = ROOT / "examples" / "agent_loop"
LONGEST = "12288"
"""Tokens of a context. To compute one takes some tens of seconds on two cores, longer than clients' keepalive."""
PACKAGES = (
    "github.com/fullstorydev/grpcurl/cmd/grpcurl",
    "google.golang.org/grpc/cmd/protoc-gen-go-grpc",
    "google.golang.org/protobuf/cmd/protoc-gen-go",
)


def main() -> None:
    build_go()
    subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=HERE / "node", check=True)
    java = ["mvn", "--quiet", "--batch-mode"]
    subprocess.run([*java, "compile"], cwd=HERE / "java", check=True)
    with server() as address:
        subprocess.run([TOOLS / "client", address], check=True)
        subprocess.run([*java, "exec:java", f"-Dexec.args={address}"], cwd=HERE / "java", check=True)
        subprocess.run(["node", "client.mjs", address, str(ROOT / "proto")], cwd=HERE / "node", check=True)
    run_agent_loops()
    subprocess.run([sys.executable, ROOT / "tools" / "transcript.py", "--check"], check=True)


def run_agent_loops() -> None:
    """The loops in Python and Go, with a model that calls two tools and answers, and the built-in one, made to call."""
    with tempfile.TemporaryDirectory() as room:
        folder = f"{room}/model"
        subprocess.run([sys.executable, "-m", "tests.clients.scripted", folder], cwd=ROOT, check=True)
        run_agent_loop("It has 53.6 degrees.\n", ("--model", folder))
    run_agent_loop("weather(", ("--chat-template", str(AGENT_LOOP / "tools.jinja")), "-force")


def run_agent_loop(expected: str, flags: tuple[str, ...], *options: str) -> None:
    with server(*flags) as address:
        for command in ([sys.executable, AGENT_LOOP / "agent_loop.py"], [TOOLS / "agentloop"]):
            done = subprocess.run([*command, "-target", address, *options], check=True, capture_output=True, text=True)
            print(done.stdout, end="")
            if expected not in done.stdout:
                sys.exit(f"{command[-1]} didn't do what it is to show")


def build_go() -> None:
    """The tools that go.mod pins, the stubs, and the clients."""
    TOOLS.mkdir(exist_ok=True)
    subprocess.run(["go", "build", "-o", f"{TOOLS}/", *PACKAGES], cwd=HERE / "go", check=True)
    build_go_client(HERE / "go", "warmkv", "client")
    build_go_client(AGENT_LOOP / "go", "agentloop", "agentloop")


def build_go_client(go: Path, module: str, name: str) -> None:
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    packages = [f"Mwarmkv/v1/{proto.name}={module}/v1" for proto in protos]
    options = [f"--{plugin}_opt={each}" for plugin in ("go", "go-grpc") for each in (f"module={module}", *packages)]
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"),
            *(f"--go_out={go}", f"--go-grpc_out={go}", *options, *map(str, protos)),
        ],
        env=os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )
    subprocess.run(["go", "vet", "."], cwd=go, check=True)
    subprocess.run(["go", "build", "-o", str(TOOLS / name), "."], cwd=go, check=True)


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """A server, by default on the built-in model, with an empty data directory."""
    with tempfile.TemporaryDirectory() as data:
        command = [str(Path(sys.executable).with_name("warmkv")), "serve", "--port", "0", "--data-dir", data]
        command += flags or ("--context-limit", LONGEST)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.match(r"listening on (\S+)", line):
                    yield found[1]
                    break
            else:
                sys.exit(f"the server ended with {process.wait()} before it was serving")
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
