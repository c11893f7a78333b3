"""`warmkv bench speculate`: what guessing tokens from the context gains, and what it costs where it doesn't help.

Two servers of one model, one with `--speculate-tokens` and one without, are asked the same things in turn.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from warmkv_bench.client import BrokenStream, Client, RequestFailed, generation, tokens_content
from warmkv_bench.config import ConfigError
from warmkv_bench.environment import environment, model_note
from warmkv_bench.options import DEFAULT_MODEL, ModelOption, ServerArgsOption, usage_error
from warmkv_bench.prompts import Prompts
from warmkv_bench.report import markdown_table
from warmkv_bench.spawn import ServerFailed
from warmkv_bench.stats import estimate, paired_ratio
from warmkv_bench.tables import Table
from warmkv_bench.target import spawned_target
from warmkv_bench.terminal import Terminal

REQUEST_TIMEOUT_S = 600.0
PASSAGE = 48
"""Tokens of the passage that a repetitive prompt says again and again."""


class Case(StrEnum):
    """What is asked."""

    REPETITIVE = "repetitive"
    """A passage over and over."""
    PLAIN = "plain"
    """Text without repetitions. The greedy answer may repeat itself all the same, as small models' do."""
    SAMPLED = "sampled"
    """The same at temperature 1, with a seed: what there is to lose where nothing repeats."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, asked of both servers. Rates are tokens a second from the first token to the last."""

    case: Case
    run: int
    plain_per_s: float
    speculating_per_s: float
    same_tokens: int
    """Tokens before the first difference; rounding may turn a choice between two that are nearly equally likely."""


def speculate(
    tokens: Annotated[int, typer.Option(min=1, help="--speculate-tokens of the server that guesses.")] = 8,
    context: Annotated[int, typer.Option(min=2 * PASSAGE, help="Tokens of each prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, help="Length of every answer.")] = 128,
    runs: Annotated[int, typer.Option(min=1, help="Prompts of each case.")] = 10,
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
    model: ModelOption = DEFAULT_MODEL,
    server_args: ServerArgsOption = "",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path(
        "results"
    ),
) -> None:
    """Decode with guesses and without, interleaved. Starts its own servers."""
    terminal = Terminal()

    async def measure_both() -> tuple[list[Pair], dict[str, Any]]:
        plain = ["--model", model, *shlex.split(server_args)]
        guessing = [*plain, "--speculate-tokens", str(tokens)]
        async with spawned_target(plain, REQUEST_TIMEOUT_S) as one, spawned_target(guessing, REQUEST_TIMEOUT_S) as two:
            where = environment(await one.client.info(), one.data_dir, guessing)
            prompts = await Prompts.of_server(one.client, seed)
            return await measure(one.client, two.client, prompts, context, output_tokens, runs), where

    try:
        pairs, where = asyncio.run(measure_both())
    except (ConfigError, ServerFailed, RequestFailed, BrokenStream) as error:
        raise usage_error(str(error)) from None
    config = {"tokens": tokens, "context": context, "output_tokens": output_tokens, "runs": runs, "seed": seed}
    found = {"schema_version": 1, "environment": where, "config": config, "pairs": [asdict(pair) for pair in pairs]}
    output.mkdir(parents=True, exist_ok=True)
    (output / "speculate.json").write_text(json.dumps(found, indent=1) + "\n")
    table = pairs_table(pairs, output_tokens)
    notes = "".join(f"- {note}\n" for note in filter(None, [model_note(where)]))
    (output / "report.md").write_text(f"# Speculative decoding, {where['time']}\n\n{notes}{markdown_table(table)}\n")
    terminal.table(table)
    terminal.say(f"results and report: {output}")


async def measure(
    plain: Client, speculating: Client, prompts: Prompts, context: int, output_tokens: int, runs: int
) -> list[Pair]:
    """Ask both servers for every prompt, each first every second time. One pair of each case warms up, unmeasured."""
    pairs = []
    for run in range(-1, runs):
        for case in Case:
            ids = prompt_of(case, prompts, run + 1, context)
            request = generation("", tokens_content(ids), output_tokens)
            if case is Case.SAMPLED:
                request.sampling.temperature, request.sampling.seed = 1.0, run + 1
            answers = {}
            for client in [plain, speculating] if run % 2 else [speculating, plain]:
                answers[client] = await client.generate(request)
            one, two = answers[plain], answers[speculating]
            if len(one.token_ids) != output_tokens or len(two.token_ids) != output_tokens:
                raise BrokenStream(f"{len(one.token_ids)} and {len(two.token_ids)} tokens came, not {output_tokens}")
            both = zip(one.token_ids, two.token_ids, strict=True)
            same = next((place for place, (left, right) in enumerate(both) if left != right), output_tokens)
            if run >= 0:
                pairs.append(Pair(case, run, _rate(one.token_times_ms), _rate(two.token_times_ms), same))
    return pairs


def prompt_of(case: Case, prompts: Prompts, ordinal: int, count: int) -> list[int]:
    """Exactly `count` token ids."""
    number = len(Case) * ordinal + list(Case).index(case)
    if case is not Case.REPETITIVE:
        return prompts.tokens(number, count)
    passage = prompts.tokens(number, PASSAGE)
    return (passage * (count // PASSAGE + 1))[:count]


def pairs_table(pairs: Sequence[Pair], output_tokens: int) -> Table:
    """Medians of the rates, their ratio from pairs, and how many answers were the same."""
    rows = []
    for case in Case:
        own = [pair for pair in pairs if pair.case is case]
        without, with_ = [pair.plain_per_s for pair in own], [pair.speculating_per_s for pair in own]
        ratio, base, rate = paired_ratio(with_, without), estimate(without), estimate(with_)
        if ratio is None or base is None or rate is None:
            continue
        interval = f" [{ratio.ci95[0]:.2f}-{ratio.ci95[1]:.2f}]" if ratio.ci95 else ""
        worst = min(with_each / each for with_each, each in zip(with_, without, strict=True))
        same = sum(pair.same_tokens == output_tokens for pair in own)
        rows.append(
            (
                str(case),
                f"{base.median:.1f}",
                f"{rate.median:.1f}",
                f"{ratio.ratio:.2f}{interval}",
                f"{worst:.2f}",
                f"{same} of {len(own)}",
            )
        )
    columns = ("Prompt", "tokens/s without", "with guesses", "ratio", "worst pair", "same answers")
    return Table("Speculative decoding, one stream", columns, rows, labels=1)


def _rate(times_ms: Sequence[float]) -> float:
    return (len(times_ms) - 1) * 1000 / (times_ms[-1] - times_ms[0])
