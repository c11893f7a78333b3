"""Whether what would be published works where nothing else is installed.

    python tools/release_check.py requirements/cpu.txt

Builds the sdist and, from it, the wheel. Installs the wheel into two clean environments: the client's without extras,
and the server's with the extra that the lock file is named after; versions in both, with their hashes, are the lock's.
In the first the client is imported and the command says what is missing; in the second the built-in model is served,
and the client of the first asks it for an answer. Then the server is killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("WARMKV_", "PYTHON", "VIRTUAL_ENV"))
}
ASK = """
import sys
from warmkv.client import Client, WarmKVError

with Client(sys.argv[1], timeout=120) as client:
    answer = client.chat("ada", "What is a cache?", max_tokens=16)
    assert answer.text, answer
    assert answer.finished.persisted, answer
    try:
        client.get("nobody")
    except WarmKVError as error:
        assert error.reason == "AGENT_NOT_FOUND", error
"""


def say(what: str) -> None:
    print(f"release-check: {what}", flush=True)


def out_of(*command: str | Path, status: int = 0) -> str:
    """Both outputs of a command that is to end with this status.

    Raises:
        SystemExit: it ended with another one.
    """
    ended = subprocess.run(
        command,
        cwd=tempfile.gettempdir(),  # nothing of the checkout is on the path
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode != status:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {ended.returncode}:\n{ended.stdout}")
    return ended.stdout


def built(folder: Path) -> Path:
    """The wheel, from an sdist of a copy of the checkout, which a build would leave its files in."""
    listed = out_of("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    out_of(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    say(f"built {sdist.name} and {wheel.name}")
    return wheel


def environment(folder: Path, wheel: Path, extra: str, lock: Path) -> Path:
    """A new environment with the wheel, its extra and what those need; returns where its commands are."""
    venv.create(folder, symlinks=True)
    uv = Path(sys.executable).with_name("uv")
    wanted = f"warmkv[{extra}] @ {wheel.as_uri()}" if extra else f"warmkv @ {wheel.as_uri()}"
    # The lock's hashes are checked, since uv verifies those that a constraint has.
    python = folder / "bin/python"
    out_of(uv, "pip", "install", "--quiet", "--python", python, "--constraint", lock, wanted)
    return folder / "bin"


def check_client(commands: Path) -> None:
    """The client needs gRPC and protobuf alone, and the command says what else there is."""
    listing = "import importlib.metadata as m; print(*(each.name for each in m.distributions()))"
    names = {name.replace("_", "-") for name in out_of(commands / "python", "-c", listing).split()}
    if names != {"googleapis-common-protos", "grpcio", "grpcio-status", "protobuf", "typing-extensions", "warmkv"}:
        raise SystemExit(f"without extras, the wheel brings {', '.join(sorted(names))}")
    out_of(commands / "python", "-c", "from warmkv.client import Client, text; Client().close()")
    if "pip install" not in out_of(commands / "warmkv", "serve", status=2):
        raise SystemExit("`warmkv serve` without the server's packages doesn't say what to install")
    say("the client alone imports, and its command says what the server needs")


def check_server(commands: Path, client: Path, folder: Path) -> None:
    """The server serves the built-in model, and the client gets an answer that is kept."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if (told := out_of(commands / "warmkv", "version").strip()) != version:
        raise SystemExit(f"`warmkv version` says {told}, and pyproject.toml {version}")
    out_of(commands / "warmkv", "eval", "--help")
    with serving(commands, folder) as address:
        out_of(commands / "warmkv", "health", "--target", address)
        out_of(client / "python", "-c", ASK, address)
    say("the server answered the client")


@contextmanager
def serving(commands: Path, folder: Path) -> Iterator[str]:
    """The address of a server, which is killed at the end."""
    log = folder / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [commands / "warmkv", "serve", "--port", "0", "--data-dir", folder / "data"],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line.startswith("listening on "):
            raise SystemExit(f"the server said {line!r} and ended with {process.wait()}:\n{log.read_text()}")
        yield line.removeprefix("listening on ")
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", type=Path, metavar="LOCK", help="requirements/cpu.txt or requirements/cuda13.txt")
    lock = parser.parse_args().lock.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = built(folder)
        client = environment(folder / "client", wheel, "", lock)
        check_client(client)
        server = environment(folder / "server", wheel, lock.stem, lock)
        check_server(server, client, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
