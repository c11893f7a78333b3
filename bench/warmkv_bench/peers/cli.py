"""`warmkv bench peers`: WarmKV beside other ways to serve the same model."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from warmkv import v1 as pb
from warmkv_bench.config import ConfigError
from warmkv_bench.environment import environment
from warmkv_bench.options import listed, usage_error
from warmkv_bench.peers.mlx_lm_process import MLXLMProcess
from warmkv_bench.peers.openai_http import mlx_lm_server
from warmkv_bench.peers.peer import Peer, PeerFailed
from warmkv_bench.peers.side_by_side import PeerSample, SideBySide, peers_json, peers_table
from warmkv_bench.peers.warmkv_peer import WarmKVPeer
from warmkv_bench.report import markdown_table
from warmkv_bench.terminal import Terminal

P = TypeVar("P", bound=Peer)

REQUEST_TIMEOUT_S = 3600.0


class PeerName(StrEnum):
    """Peers that stand beside WarmKV, which is always there: it counts the tokens."""

    MLX_LM_SERVER = "mlx_lm.server"
    MLX_LM = "mlx-lm"


def peers(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A folder with a model that all peers can load.")],
    against: Annotated[str, typer.Option(help=f"Any of {', '.join(PeerName)}.")] = ",".join(PeerName),
    contexts: Annotated[str, typer.Option(help="Tokens of the shared prefix, comma-separated.")] = "1024,4096",
    runs: Annotated[int, typer.Option(min=1, help="Repetitions of everything.")] = 2,
    output_tokens: Annotated[int, typer.Option(min=2, help="Length of every answer.")] = 32,
    float32: Annotated[
        bool, typer.Option("--float32", help="Serve a copy in float32: on a CPU other types miss the BLAS.")
    ] = False,
    same_blas: Annotated[
        bool, typer.Option("--same-blas/--stock-blas", help="Give peers on a CPU the BLAS that WarmKV uses.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of prompts and order.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path(
        "results"
    ),
) -> None:
    """The same model, prompts and lengths for WarmKV and others, interleaved. Exits with 1 if any request failed."""
    terminal = Terminal()
    try:
        if not (model / "config.json").is_file():
            raise ConfigError(f"--model is {model}: it must be a folder with a model's config.json")
        what = SideBySide(listed("--contexts", contexts, int), runs, output_tokens, seed)
        names = listed("--against", against, PeerName)
        samples, where = asyncio.run(_measure(what, model, names, float32, same_blas, terminal))
    except (ConfigError, PeerFailed) as error:
        raise usage_error(str(error)) from None
    config = {
        "contexts": what.contexts,
        "runs": runs,
        "output_tokens": output_tokens,
        "float32": float32,
        "same_blas": same_blas,
        "seed": seed,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "peers.json").write_text(json.dumps(peers_json(samples, where, config), indent=1) + "\n")
    table = peers_table(samples)
    (output / "report.md").write_text(f"# Side by side, {where['time']}\n\n{markdown_table(table)}\n")
    terminal.table(table)
    terminal.say(f"results and report: {output}")
    if any(sample.error is not None for sample in samples):
        raise typer.Exit(1)


async def _measure(
    what: SideBySide, model: Path, names: tuple[PeerName, ...], float32: bool, same_blas: bool, terminal: Terminal
) -> tuple[list[PeerSample], dict[str, Any]]:
    async with AsyncExitStack() as stack:
        if float32:
            model = await stack.enter_async_context(_in_float32(model))
        warmkv = await _started(stack, WarmKVPeer(model, REQUEST_TIMEOUT_S))
        assert warmkv.client is not None
        info = await warmkv.client.info()
        preload = library_of(info.blas) if same_blas else None
        terminal.say(f"{info.device} {info.blas}; peers load {preload or 'no other BLAS than their own'}")
        others = [_adapter(name, model, preload) for name in names]
        everyone: list[Peer] = [warmkv, *[await _started(stack, other) for other in others]]

        async def count_tokens(text: str) -> int:
            assert warmkv.client is not None
            return await warmkv.client.count_tokens(pb.Content(text=text))

        samples = await what.run(everyone, count_tokens, terminal.say)
        return samples, environment(info, None, ["--model", str(model)])


def _adapter(name: PeerName, model: Path, preload: str | None) -> Peer:
    match name:
        case PeerName.MLX_LM_SERVER:
            return mlx_lm_server(sys.executable, model, end_tokens(model), preload, REQUEST_TIMEOUT_S)
        case PeerName.MLX_LM:
            return MLXLMProcess(sys.executable, model, preload)


async def _started(stack: AsyncExitStack, peer: P) -> P:
    stack.push_async_callback(peer.close)
    await peer.start()
    return peer


def library_of(blas: str) -> str | None:
    """The path in a GetServerInfo.blas such as "mkl (/usr/lib/libmkl_rt.so)"; None if there is none."""
    found = re.search(r"\((/.+)\)$", blas)
    return found[1] if found else None


def end_tokens(model: Path) -> list[int]:
    """The end-of-sequence ids of a model folder."""
    config: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            config |= json.loads((model / name).read_text())
    found = config.get("eos_token_id", [])
    return found if isinstance(found, list) else [found]


@asynccontextmanager
async def _in_float32(model: Path) -> AsyncIterator[Path]:
    """A copy of the model with all weights in float32, made by mlx-lm in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="warmkv-bench-"))
    try:
        copy = folder / "model"
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(model)]
        done = await asyncio.to_thread(
            subprocess.run, [*command, "--mlx-path", str(copy), "--dtype", "float32"], capture_output=True, check=False
        )
        if done.returncode:
            raise PeerFailed(f"mlx-lm did not convert {model} to float32:\n{done.stderr.decode()[-1000:]}")
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)
