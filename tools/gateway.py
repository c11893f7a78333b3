"""A server with a gateway in front of it, for OpenAI's and Anthropic's clients: `make gateway`.

    python tools/gateway.py [--port 8080] [--model DIR and whatever else `warmkv serve` takes]

Starts `warmkv serve` and Shepherd Model Gateway on this machine alone, prints lines to try, and ends both with Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

WARMKV = Path(sys.executable).with_name("warmkv")
PLACE = Path(".gateway")
SMG, PYTHON, LOG = PLACE / "venv/bin/smg", PLACE / "venv/bin/python", PLACE / "smg.log"
AGENT_HEADER = "x-warmkv-agent-id"
FLAGS = (
    # A worker that starts again is found at once, and one that is away for a moment stays known.
    *("--health-check-interval-secs", "2", "--worker-startup-check-interval", "1", "--no-remove-unhealthy-workers"),
    # Who the agent is.
    *("--request-id-headers", AGENT_HEADER, "--routing-key-headers", AGENT_HEADER),
    *("--policy", "cache_aware"),
)
_START_SECONDS = 120.0

TRY = """
The gateway listens on http://127.0.0.1:{port}; it serves the model {model!r}. In another terminal:

curl -s http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello, who are you?"}}]}}'

{python} -c 'from openai import OpenAI; \\
print(OpenAI(base_url="http://127.0.0.1:{port}/v1", api_key="none").chat.completions.create(model="{model}", \\
messages=[{{"role": "user", "content": "Hello, who are you?"}}]).choices[0].message.content)'

Ctrl-C ends both. The gateway's log is {log}; docs/gateway.md says the rest.
"""


def command(port: int, metrics_port: int, workers: Sequence[int], *more: str) -> list[str | Path]:
    """How the gateway is started, with so many servers behind it."""
    urls = [f"grpc://127.0.0.1:{worker}" for worker in workers]
    own = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1"]
    own += ["--prometheus-port", str(metrics_port)]
    return [SMG, "launch", *own, "--worker-urls", *urls, *FLAGS, *more]


def ready(port: int) -> str:
    """The first model that the gateway serves; empty if it serves none, or not yet."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
            name = str(json.load(answer)["data"][0]["id"])
        asked = json.dumps({"model": name, "prompt": "a", "max_tokens": 1}).encode()
        header = {"Content-Type": "application/json"}
        to = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", asked, header)
        with urllib.request.urlopen(to, timeout=30):  # it has the tokenizer, too
            return name
    return ""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def started(what: Sequence[str | Path], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the block, which ends it."""
    process: subprocess.Popen[bytes] = subprocess.Popen(what, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def served(port: int, server: subprocess.Popen[bytes], gateway: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the gateway, whose log this is, serves; the model that it does."""
    give_up = time.monotonic() + _START_SECONDS
    while not (model := ready(port)):
        ended = server.poll() is not None or gateway.poll() is not None
        if ended or time.monotonic() > give_up:
            what = "gateway" if server.poll() is None else "server"
            raise SystemExit(f"the {what} doesn't serve; the gateway's log is {log}")
        time.sleep(0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="A server behind a gateway.")
    parser.add_argument("--port", type=int, default=8080, help="of the gateway")
    options, more = parser.parse_known_args()
    for each in (signal.SIGINT, signal.SIGTERM):  # while it starts, too, nothing is left behind
        signal.signal(each, signal.default_int_handler)
    worker, metrics = free_port(), free_port()
    # Clients that bring no identity send everything anew each time: what was said before is kept for them.
    ports = ["--port", "0", "--gateway-port", str(worker)]
    serve: list[str | Path] = [WARMKV, "serve", *ports, "--keep-anonymous", "2h", *more]
    with (
        LOG.open("wb") as log,
        started(serve) as server,
        started(command(options.port, metrics, [worker]), stdout=log, stderr=log) as gateway,
    ):
        model = served(options.port, server, gateway, LOG)
        print(TRY.format(port=options.port, model=model, python=PYTHON, log=LOG), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
