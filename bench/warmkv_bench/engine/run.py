"""A run: for each model a server and mlx-lm beside it, the chosen comparisons, and what is written about them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from warmkv import v1 as pb
from warmkv_bench.client import Client
from warmkv_bench.config import ConfigError
from warmkv_bench.engine.bench import Bench, Plan
from warmkv_bench.engine.comparisons import RUNNERS, Name, stock
from warmkv_bench.engine.mlx_lm_process import MLXLM
from warmkv_bench.engine.models import model_folder
from warmkv_bench.engine.outcome import outcomes_table
from warmkv_bench.engine.plot import draw_gaps
from warmkv_bench.environment import environment
from warmkv_bench.peers.cli import library_of
from warmkv_bench.prompts import Prompts
from warmkv_bench.report import markdown_table
from warmkv_bench.spawn import ServerProcess

TIMEOUT_S = 3600.0


async def run_engine(
    models: Sequence[str],
    names: Sequence[Name],
    plan: Plan,
    *,
    folder: Path,
    peer_settings: Mapping[str, str],
    max_time_s: float,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures, and returns what results.json holds.

    Args:
        folder: absolute; where written models and primed contexts are, and stay.
        peer_settings: variables for mlx-lm's process where it runs on WarmKV's BLAS.
    """
    deadline = time.monotonic() + max_time_s
    outcomes: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    problems: list[str] = []
    where: dict[str, Any] = {}
    for model in models:
        weights = model_folder(model, folder)
        # What is kept must be of the same lengths: cold contexts are made to begin like none of them.
        data = folder / "data" / f"{weights.name}-{seed}-{'-'.join(map(str, plan.contexts))}"
        gap_ms = str(plan.max_decode_gap_ms)
        arguments = ["--model", str(weights), "--max-decode-gap-ms", gap_ms]
        async with AsyncExitStack() as stack:
            client, info = await stack.enter_async_context(_served(arguments, data, {}))
            where = where or environment(info, data, arguments)
            preload = library_of(info.blas)
            mlx_lm = await stack.enter_async_context(MLXLM(weights, preload, peer_settings))
            prompts = await Prompts.of_server(client, seed)
            limit = info.context_limit - max(plan.suffixes) - plan.decode_tokens - 1
            if max(plan.contexts) > limit:
                raise ConfigError(
                    f"--contexts has {max(plan.contexts)}: {model} has room for {limit} before the suffix"
                )
            bench = Bench(model, plan, client, mlx_lm, prompts, say, deadline, outcomes, samples, problems, gaps)
            for name in (each for each in Name if each in names and each in RUNNERS):
                if time.monotonic() > deadline:
                    problems.append(f"{model} {name}: left out, time was up")
                    continue
                await RUNNERS[name](bench)
            if Name.STOCK in names:
                stock_lm = await stack.enter_async_context(MLXLM(weights, None, {}))
                bench.mlx_lm = stock_lm
                servers = {"mkl": bench} if "mkl" in info.blas else {}
                try:
                    other, other_info = await stack.enter_async_context(
                        _served(arguments, None, {"WARMKV_BLAS": "openblas"})
                    )
                    if "openblas" in other_info.blas:
                        servers["openblas"] = bench.on(other)
                    else:
                        problems.append(f"{model} stock: there is no OpenBLAS here (apt-get install libopenblas0)")
                finally:
                    await stock(bench, servers)
    return {
        "schema_version": 1,
        "environment": where,
        "config": {
            "models": list(models),
            "only": [str(name) for name in names],
            "seed": seed,
            "peer_settings": dict(peer_settings),
            **asdict(plan),
        },
        "outcomes": outcomes,
        "samples": samples,
        "gaps": gaps,
        "problems": problems,
    }


def write(results: dict[str, Any], output: Path) -> None:
    """results.json, report.md, and the plot of the gaps if there are any."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    machine = results["environment"]["machine"]
    server = results["environment"]["server"]
    parts = [
        f"# The engine beside mlx-lm, {results['environment']['time']}",
        f"{machine['processor']}, {machine['cores']} cores; {server['device']} {server['blas']}.",
        *(f"- {problem}" for problem in results["problems"]),
        markdown_table(outcomes_table(results["outcomes"])),
    ]
    if results["gaps"]:
        draw_gaps(results["gaps"], output / "gaps.svg")
        parts.append("![gaps between tokens](gaps.svg)")
    (output / "report.md").write_text("\n\n".join(parts) + "\n")


@asynccontextmanager
async def _served(
    arguments: list[str], data: Path | None, settings: Mapping[str, str]
) -> AsyncIterator[tuple[Client, pb.GetServerInfoResponse]]:
    async with (
        ServerProcess(arguments, data, settings) as process,
        Client(process.address, TIMEOUT_S) as client,
    ):
        await client.ready()
        yield client, await client.info()
