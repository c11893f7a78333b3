"""What a gateway costs: the same chats over our own gRPC and through it, turn about, on one server.

    python bench/gateway.py [--rounds 15] [--out DIR]

Needs what `make gateway` installs. Writes report.md: first token and tokens a second, and the ratios of each pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import gateway
from warmkv import v1
from warmkv.client import Client

TOKENS = 64
LENGTHS = (20, 1000)
"""Words of the user's message."""


def asked(words: int, number: int) -> str:
    """Another each time, so that nothing is reused."""
    return f"Round {number}. " + " ".join(f"word{n % 97}" for n in range(words))


def over_ours(client: Client, said: str) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second behind it."""
    content = v1.Content(chat=v1.ChatMessages(messages=[v1.ChatMessage(role="user", content=said)]))
    request = v1.GenerateRequest(content=content, max_tokens=TOKENS, ignore_eos=True)
    began, times = time.perf_counter(), []
    for event in client.agent_service.Generate(request):
        times += [time.perf_counter()] * len(event.delta.token_ids)
    return times[0] - began, (len(times) - 1) / (times[-1] - times[0])


def over_gateway(port: int, model: str, said: str) -> tuple[float, float]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": said}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    header = {"Content-Type": "application/json"}
    to = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), header)
    began = time.perf_counter()
    with urllib.request.urlopen(to) as answer:
        said_at = (time.perf_counter() for line in answer if b'"content":"' in line and b'"content":""' not in line)
        times = list(said_at)
    # Of characters that several tokens make together, all but the last say nothing.
    return times[0] - began, (TOKENS - 1) / (times[-1] - times[0])


def table(found: dict[tuple[int, str], list[tuple[float, float]]]) -> str:
    lines = [
        "| words | first token, ours | through the gateway | ratio | tokens/s, ours | through the gateway | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for words in LENGTHS:
        ours, theirs = found[words, "ours"], found[words, "gateway"]
        row = [f"{words}"]
        for number, unit in ((0, " ms"), (1, "")):
            one, other = ([each[number] for each in side] for side in (ours, theirs))
            ratio = statistics.median(b / a for a, b in zip(one, other, strict=True))
            scale = 1000 if unit else 1
            row += [f"{statistics.median(side) * scale:.1f}{unit}" for side in (one, other)] + [f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a gateway costs.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/gateway"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    worker, own, port = (gateway.free_port() for _ in range(3))
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as data, (options.out / "log").open("wb") as log:
        ports = ["--port", str(own), "--gateway-port", str(worker)]
        serve: list[str | Path] = [gateway.WARMKV, "serve", *ports, "--data-dir", data]
        front = gateway.command(port, gateway.free_port(), [worker])
        with (
            gateway.started(serve, stdout=log, stderr=log) as server,
            gateway.started(front, stdout=log, stderr=log) as through,
        ):
            model = gateway.served(port, server, through, options.out / "log")
            with Client(f"127.0.0.1:{own}", timeout=600) as client:
                for number in range(-1, options.rounds):  # the first one warms up
                    for words in LENGTHS:
                        pair = {
                            "ours": over_ours(client, asked(words, 2 * number)),
                            "gateway": over_gateway(port, model, asked(words, 2 * number + 1)),
                        }
                        for side, figures in pair.items() if number >= 0 else ():
                            found.setdefault((words, side), []).append(figures)
    report = (
        f"# What a gateway costs\n\n{options.rounds} pairs, turn about, on one server with the built-in model: a chat "
        f"of so many words, nothing of which is reused, and {TOKENS} tokens of answer. Medians; a ratio is that of the "
        f"pairs' ratios.\n\n{table(found)}\n"
    )
    (options.out / "report.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
