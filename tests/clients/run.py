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
    subprocess.run([sys.executable, ROOT / "tools" / "transcript.py", "--check"], check=True)


def build_go() -> None:
    """The tools that go.mod pins, the stubs, and the client."""
    go = HERE / "go"
    TOOLS.mkdir(exist_ok=True)
    subprocess.run(["go", "build", "-o", f"{TOOLS}/", *PACKAGES], cwd=go, check=True)
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"),
            *(f"--go_out={go}", "--go_opt=module=warmkv", f"--go-grpc_out={go}", "--go-grpc_opt=module=warmkv"),
            *map(str, protos),
        ],
        env=os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )
    subprocess.run(["go", "vet", "."], cwd=go, check=True)
    subprocess.run(["go", "build", "-o", str(TOOLS / "client"), "."], cwd=go, check=True)


@contextmanager
def server() -> Iterator[str]:
    """A server on the built-in model, with an empty data directory."""
    with tempfile.TemporaryDirectory() as data:
        command = [str(Path(sys.executable).with_name("warmkv")), "serve", "--port", "0", "--data-dir", data]
        command += ["--context-limit", LONGEST]
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
