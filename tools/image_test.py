"""Whether the container's image is built, small, healthy at once, and keeps contexts through kill -9.

    python tools/image_test.py

Has Compose's own loader read docker/compose.yaml. Builds docker/Dockerfile for CPUs, and looks at what is in it. Runs
it as it is run, on its own defaults, with a file of tokens and a volume: waits until Docker calls it healthy, gets an
answer, kills it with -9, starts it again, and expects the agent to be there, warm. Last, `docker stop` drains it.

A daemon that answers is used; else root gets one of its own for the time of the test, and Debian's packages are
installed for that. The base image is the Dockerfile's, or where no registry can be reached one made by debootstrap.
Where none of that can be done it says what is missing, and passes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SUITE = "bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
IMAGE = "warmkv-image-test"
IMAGE_BYTES_AT_MOST = 900_000_000
CONTEXT_BYTES_AT_MOST = 30_000_000
START_SECONDS = 300.0
TOKEN = "t" * 32
ASK = f"""
import json
from warmkv.client import Client
from warmkv import v1

with Client(token="{TOKEN}", timeout=120) as client:
    answer = client.chat("ada", "Hello! My name is Grace.", max_tokens=16)
    assert answer.text, answer
    assert answer.finished.persisted, answer
    info = client.info()
    print(json.dumps([v1.CacheSource.Name(answer.cache.source), answer.agent.revision, info.blas]))
"""
"""Prints the source of the answer's context, the agent's revision, and what the server computes with."""
LISTING = """
import importlib.metadata
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

for name in filter(None, TOKENIZER_MAPPING_NAMES.values()):
    getattr(transformers, name)
print(*(each.name for each in importlib.metadata.distributions()))
"""
"""Prints the packages. What the image leaves out of them leaves every tokenizer that there is."""


class CannotRun(Exception):
    """Containers can't be run here, and why."""


def compose() -> None:
    """What Compose would refuse, such as a misspelt key, is refused by the loader that it is made of. Needs Go."""
    if not shutil.which("go"):
        say("Compose's files were not read: there is no Go")
        return
    names = (("compose.yaml",), ("compose.yaml", "cuda.yaml"))
    for files in names:
        given = [str(DOCKERFILE.with_name(name)) for name in files]
        out_of("go", "run", "github.com/compose-spec/compose-go/v2/cmd", *given, cwd=ROOT / "tools" / "compose")
    say(f"Compose reads {' and '.join('+'.join(files) for files in names)}")


def say(what: str) -> None:
    print(f"image-test: {what}", flush=True)


def out_of(*command: str | Path, **options: Any) -> str:
    """What a command prints, once it has ended well.

    Raises:
        SystemExit: it didn't.
    """
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    printed = str(ended.stdout)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {ended.returncode}:\n{printed[-8000:]}")
    return printed


def works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextmanager
def daemon(folder: Path) -> Iterator[None]:
    """Docker, for the commands within: the one that answers already, or one that is ended afterwards."""
    if works("docker", "info"):
        yield
        return
    need("dockerd", "docker.io")
    folder.mkdir()
    os.environ["DOCKER_HOST"] = f"unix://{folder}/docker.sock"
    # Nothing of the machine's network is changed: images are built on its network, and containers run without one.
    flags = ["--iptables=false", "--ip6tables=false", "--bridge=none", "--host", os.environ["DOCKER_HOST"]]
    places = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["dockerd", *flags, *places], stdout=log, stderr=log)
    try:
        give_up = time.monotonic() + 60
        while not works("docker", "info"):
            if process.poll() is not None or time.monotonic() > give_up:
                raise CannotRun(f"dockerd does not start here:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()
        for line in Path("/proc/mounts").read_text().splitlines():
            if (mounted := line.split()[1]).startswith(str(folder)):
                subprocess.run(["umount", mounted], check=False)


def need(command: str, package: str) -> None:
    """Have a command of Debian's, or raise CannotRun."""
    if shutil.which(command):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise CannotRun(f"there is no {command}, and only root on Debian can have it installed here")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", package]):
        if subprocess.run(["apt-get", "-qq", *arguments], env=environment, check=False).returncode:
            raise CannotRun(f"Debian's package {package} can't be installed here")


def base(folder: Path) -> str:
    """The image to build on."""
    pinned: str
    (pinned,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    if works("docker", "pull", "--quiet", pinned):
        say(f"on {pinned}")
        return pinned
    need("debootstrap", "debootstrap")
    packages = "ca-certificates,python3-venv,python-is-python3"
    root = folder / "base"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", SUITE, str(root)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if made.returncode:
        raise CannotRun(f"no image registry answers, and debootstrap fails:\n{made.stdout[-2000:]}")
    for left in ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(root / left, ignore_errors=True)
    # What this machine trusts, for a package index behind a certificate of its own.
    shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    trusted = [f"--change=ENV {name}={CERTIFICATES}" for name in ("PIP_CERT", "SSL_CERT_FILE")]
    with (folder / "base.tar").open("wb") as tar:
        subprocess.run(["tar", "--create", "--directory", root, "."], stdout=tar, check=True)
    shutil.rmtree(root)
    out_of("docker", "import", *trusted, folder / "base.tar", f"{IMAGE}-base")
    (folder / "base.tar").unlink()
    say(f"on Debian {SUITE} by debootstrap, {bytes_of(f'{IMAGE}-base') / 1e6:.0f} MB, for no image registry answers")
    return f"{IMAGE}-base"


def bytes_of(image: str) -> int:
    return int(out_of("docker", "image", "inspect", "--format={{.Size}}", image))


def build(on: str) -> None:
    began = time.monotonic()
    build_arguments = ["--network=host", f"--build-arg=PYTHON={on}", f"--file={DOCKERFILE}", f"--tag={IMAGE}"]
    # The old builder is in every Docker, tells the context's size, and needs no network of its own.
    printed = out_of("docker", "build", *build_arguments, ROOT, env=os.environ | {"DOCKER_BUILDKIT": "0"})
    (size, unit), *_ = re.findall(r"Sending build context to Docker daemon\s+([\d.]+)(\w+)\s*$", printed, re.MULTILINE)
    context = float(size) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    if context > CONTEXT_BYTES_AT_MOST:
        raise SystemExit(f"{size} {unit} went to the builder: .dockerignore lets too much through")
    say(f"built in {time.monotonic() - began:.0f} s, from {size} {unit} of this checkout")


def look() -> None:
    """The image is small, and has nothing that only development needs."""
    if (size := bytes_of(IMAGE)) > IMAGE_BYTES_AT_MOST:
        raise SystemExit(f"the image has {size / 1e6:.0f} MB, and {IMAGE_BYTES_AT_MOST / 1e6:.0f} MB is the most")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name = re.compile(r"[\w.-]+")
    serving = {"warmkv", *(found[0] for need in extras["server"] if (found := name.match(need)))}
    developing = {found[0] for need in extras["dev"] + extras["bench"] if (found := name.match(need))} - serving
    printed = out_of("docker", "run", "--rm", "--network=none", "--entrypoint=python", IMAGE, "-c", LISTING)
    there = printed.splitlines()[-1].split()
    if wrong := sorted(developing & {each.lower().replace("_", "-") for each in there}):
        raise SystemExit(f"the image has what only development needs: {', '.join(wrong)}")
    say(f"the image has {size / 1e6:.0f} MB, {len(there)} packages, none of development's")


def container(tokens: Path) -> str:
    """As docker/compose.yaml runs it: on its defaults, with a volume and a file of tokens."""
    mount = f"--volume={tokens}:/run/secrets/warmkv-tokens:ro"
    return out_of("docker", "run", "--detach", "--network=none", "--volume=/data", mount, IMAGE).strip()


def healthy(name: str) -> float:
    """Wait for Docker to call it healthy; the seconds that its check took. It fails only while the server loads."""
    give_up = time.monotonic() + START_SECONDS
    while True:
        state = json.loads(out_of("docker", "inspect", "--format={{json .State}}", name))
        checks = state["Health"]["Log"] or []
        loading = ("NOT_SERVING", "127.0.0.1:50051 does not answer")
        failed = [check for check in checks if check["ExitCode"] and not check["Output"].startswith(loading)]
        if not state["Running"] or failed or time.monotonic() > give_up:
            raise SystemExit(f"it is not healthy: {state}\n{out_of('docker', 'logs', name)}")
        if state["Health"]["Status"] == "healthy":
            return seconds_of(checks[-1])
        time.sleep(0.2)


def seconds_of(check: dict[str, str]) -> float:
    """Between two times such as 2026-01-31T12:00:59.123456789Z, less than a minute apart."""
    start, end = (float(check[each][17:26]) for each in ("Start", "End"))
    return (end - start) % 60


def asked(name: str) -> tuple[str, int, str]:
    source, revision, blas = json.loads(out_of("docker", "exec", name, "python", "-c", ASK))
    return source, revision, blas


def run(folder: Path) -> None:
    tokens = folder / "tokens"
    tokens.write_text(f"default {TOKEN}\n")
    tokens.chmod(0o444)  # the server in it is another user
    name = container(tokens)
    try:
        took = healthy(name)
        _, revision, blas = asked(name)
        if blas == "reference":
            raise SystemExit("MLX has no fast BLAS in the image")
        say(f"healthy, by a check of {took:.1f} s; it answers, with {blas}")
        out_of("docker", "kill", "--signal=KILL", name)
        out_of("docker", "wait", name)
        out_of("docker", "start", name)
        healthy(name)
        source, after, _ = asked(name)
        if (source, after) != ("CACHE_SOURCE_WARM", revision + 1):
            raise SystemExit(f"after kill -9 the source was {source}, revision {after} after {revision}")
        out_of("docker", "stop", "--time=60", name)
        if status := int(out_of("docker", "wait", name)):
            raise SystemExit(f"`docker stop` ended it with {status}:\n{out_of('docker', 'logs', name)}")
        say("after kill -9 the agent was warm; `docker stop` drained it")
    finally:
        out_of("docker", "rm", "--force", "--volumes", name)


def main() -> int:
    compose()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="warmkv-image-")))
        try:
            stack.enter_context(daemon(folder / "docker"))
            on = base(folder)
        except CannotRun as why:
            say(f"SKIPPED, nothing was tested: {why}")
            return 0
        build(on)
        look()
        run(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
