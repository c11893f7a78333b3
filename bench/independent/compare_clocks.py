"""Checks the benchmark's stopwatch against a client in another language. Called by `make bench-clock`.

Both measure the same request on the same agent of the same server, in turn: hot, ephemeral and greedy, so that all of
them do the same. Exits with 1 if the medians of TTFT or ITL differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from warmkv_bench.client import AGENT_PREFIX, Client, generation, tokens_content
from warmkv_bench.options import DEFAULT_MODEL, ServerChoice
from warmkv_bench.prompts import Prompts
from warmkv_bench.results import Sample
from warmkv_bench.samples import filled
from warmkv_bench.stats import paired_ratio

HERE = Path(__file__).parent
PROTO = HERE.parents[1] / "proto"
AGENT = AGENT_PREFIX + "clock"
SUFFIX_TOKENS, OUTPUT_TOKENS = 32, 64
TIMEOUT_S = 600.0


async def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--context", type=int, default=1024, help="tokens of the hot prefix")
    options.add_argument("--pairs", type=int, default=100, help="measurements of each client")
    options.add_argument("--tolerance", type=float, default=0.05, help="largest difference of the medians")
    chosen = options.parse_args()
    server = ServerChoice.of(None, True, DEFAULT_MODEL, "")
    async with server.connected(TIMEOUT_S) as target:
        pairs = await measure(target.client, chosen.context, chosen.pairs)
    agrees = True
    for metric in ("ttft", "itl"):
        here, there = [one[metric] for one, _ in pairs], [other[metric] for _, other in pairs]
        ratio = paired_ratio(here, there)
        assert ratio is not None
        agrees &= abs(ratio.ratio - 1) <= chosen.tolerance
        interval = "" if ratio.ci95 is None else f", 95% interval {ratio.ci95[0]:.3f} to {ratio.ci95[1]:.3f}"
        print(
            f"{metric}: benchmark {median(here):.2f} ms, Node {median(there):.2f} ms, ratio {ratio.ratio:.3f}{interval}"
        )
    print(f"{len(pairs)} pairs; the clocks {'agree' if agrees else 'DISAGREE'} within {chosen.tolerance:.0%}")
    sys.exit(0 if agrees else 1)


async def measure(client: Client, context: int, pairs: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Timings in milliseconds, the benchmark's and Node's, in an order that changes from pair to pair."""
    prompts = await Prompts.of_server(client, seed=0)
    await client.prime(AGENT, tokens_content(prompts.tokens(0, context)))
    suffix = prompts.tokens(1, SUFFIX_TOKENS)
    node = await asyncio.create_subprocess_exec(
        *("node", str(HERE / "timing.mjs"), client.target, str(PROTO)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert node.stdin is not None
    assert node.stdout is not None

    async def there() -> dict[str, float]:
        assert node.stdin is not None
        assert node.stdout is not None
        request = {"agent": AGENT, "ids": suffix, "tokens": OUTPUT_TOKENS}
        node.stdin.write(json.dumps(request).encode() + b"\n")
        timing: dict[str, float] = json.loads(await node.stdout.readline())
        return timing

    async def here() -> dict[str, float]:
        content = tokens_content(suffix)
        answer = await client.generate(generation(AGENT, content, OUTPUT_TOKENS, ephemeral=True))
        sample = filled(blank(context), answer, [])
        assert sample.ttft_ms is not None
        assert sample.itl_ms is not None
        return {"ttft": sample.ttft_ms, "itl": sample.itl_ms, "tokens": len(answer.token_ids)}

    try:
        await here(), await there()  # the first of each pays for what is set up once
        found = []
        for index in range(pairs):
            if index % 2:
                other, one = await there(), await here()
            else:
                one, other = await here(), await there()
            if not one["tokens"] == other["tokens"] == OUTPUT_TOKENS:
                sys.exit(f"{one['tokens']:g} and {other['tokens']:g} tokens were streamed, must be {OUTPUT_TOKENS}")
            found.append((one, other))
        return found
    finally:
        node.stdin.close()
        await node.wait()
        await client.delete(AGENT)


def blank(context: int) -> Sample:
    facts: dict[str, Any] = dict.fromkeys(("isolation", "purpose", "round_key"), "clock")
    return Sample(context, context, SUFFIX_TOKENS, "hot", "streaming", 1, 0, 1, **facts)


if __name__ == "__main__":
    asyncio.run(main())
