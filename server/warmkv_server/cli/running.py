"""`warmkv ps` and `warmkv top`: what a server does now."""

from __future__ import annotations

import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmkv_server.cli import reports
from warmkv_server.cli.connection import Json, on_server
from warmkv_server.errors import OperatorError
from warmkv_server.offline import words
from warmkv_server.offline.words import size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from warmkv import v1
    from warmkv.client import Client

_WIDE = 30


@on_server
def ps(client: Client, as_json: Json = False) -> None:
    """List the agents that a server works on, with the progress of each."""
    seen = Seen.now(client)
    if as_json:
        gauges = seen.stats.gauges
        typer.echo(
            reports.dumped(
                {
                    "agents": [reports.as_json(each) for each in seen.busy],
                    "batch_size": gauges.batch_size,
                    "queue_depth": gauges.queue_depth,
                }
            )
        )
        return
    if seen.busy:
        words.console().print(_busy(seen.busy))
    typer.echo(_load(seen.stats.gauges))


@on_server
def top(
    client: Client,
    every: Annotated[float, typer.Option(help="Seconds from one look to the next.")] = 1.0,
    count: Annotated[
        int, typer.Option(help="How many looks; 0 until Ctrl-C. Default: 0 on a terminal, and 1 elsewhere.")
    ] = -1,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object for each look.")] = False,
) -> None:
    """Watch a server: where contexts are, where requests found theirs, how long they took, and what runs now."""
    if every <= 0:
        raise OperatorError(f"--every can't be {every:g}; give seconds, such as 1")
    on_terminal = sys.stdout.isatty() and not as_json
    left = count if count >= 0 else (0 if on_terminal else 1)
    info, before = client.info(), Seen.now(client)
    if not on_terminal:
        _print(info, before, as_json)
        for _ in range(left - 1) if left else iter(int, 1):
            time.sleep(every)
            before = Seen.now(client)
            _print(info, before, as_json)
        return
    from rich.live import Live

    # By a flag: what an interrupt raises can get lost where it comes while an object is taken apart.
    ended = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    with Live(screen(info, before, None), console=words.console(), auto_refresh=False, screen=not left) as live:
        while left != 1 and not ended.wait(every):
            seen = Seen.now(client)
            live.update(screen(info, seen, before), refresh=True)
            before, left = seen, left - 1


@dataclass(frozen=True)
class Seen:
    """A server at one moment. `at` in seconds of `time.monotonic()`."""

    stats: v1.GetServerStatsResponse
    busy: list[v1.Agent]
    at: float

    @classmethod
    def now(cls, client: Client) -> Seen:
        from warmkv import v1

        busy = [each for each in client.agents() if each.activity != v1.ACTIVITY_IDLE]
        return cls(client.stats(), busy, time.monotonic())


def _print(info: v1.GetServerInfoResponse, seen: Seen, as_json: bool) -> None:
    if as_json:
        busy = [reports.as_json(each) for each in seen.busy]
        typer.echo(reports.dumped({**reports.as_json(seen.stats), "busy": busy}))
    else:
        words.console().print(screen(info, seen, None))


def screen(info: v1.GetServerInfoResponse, seen: Seen, before: Seen | None) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    stats = seen.stats
    gauges, up = stats.gauges, time.time() - stats.start_time.ToSeconds()
    head = f"{info.model_id} on {info.device} · up {words.span(up)} · {_load(gauges)}"
    tiers = words.table(("", ""), ())
    tiers.show_header = False
    for name, used, limit in (
        ("RAM", gauges.hot_bytes, info.hot_bytes_limit),
        ("disk", gauges.disk_bytes, info.disk_bytes_limit),
    ):
        of = f"{reports.bar(used, limit, _WIDE)} {size(used)} of {size(limit)}" if limit else f"{size(used)}, no limit"
        tiers.add_row(name, of)
    agents = ", ".join(
        f"{number:,} {name.removeprefix('TIER_').lower()}" for name, number in sorted(gauges.agents_by_tier.items())
    )
    stale = f", {gauges.stale_agents:,} of another model or other settings" if gauges.stale_agents else ""
    tiers.add_row("agents", (agents or "none") + stale)
    if gauges.hidden_agents:
        tiers.add_row("without one", f"{gauges.hidden_agents:,} contexts, {size(gauges.hidden_bytes)}")
    parts: list[RenderableType] = [Text(head, style="bold"), tiers, _sources(seen, before), _flow(seen, before)]
    return Group(*parts, *([_busy(seen.busy)] if seen.busy else []))


def _sources(seen: Seen, before: Seen | None) -> Table:
    """How many requests found their context where, and how long their first token took."""
    counters, earlier = seen.stats.counters, before.stats.counters if before is not None else None
    made = words.table(("context",), ("requests", "now", "tokens reused", "first token, mean", "now"))
    reused = {"hot": counters.hot_tokens_reused, "warm": counters.warm_tokens_reused}
    reused["shared"] = counters.shared_tokens_reused
    for name in ("hot", "warm", "shared", "cold"):
        key = f"CACHE_SOURCE_{name.upper()}"
        now = ""
        if before is not None and earlier is not None:
            more = counters.requests_by_source[key] - earlier.requests_by_source[key]
            now = f"{more / (seen.at - before.at):.1f}/s"
        made.add_row(
            name,
            f"{counters.requests_by_source[key]:,}",
            now,
            f"{reused[name]:,}" if name in reused else "",
            _first_token(counters, None, key),
            _first_token(counters, earlier, key) if earlier is not None else "",
        )
    return made


def _first_token(counters: v1.ServerCounters, earlier: v1.ServerCounters | None, key: str) -> str:
    """The mean, since the server started or since an earlier look."""
    answers, spent = counters.answers_by_source[key], reports.seconds(counters.first_token_by_source[key])
    if earlier is not None:
        answers -= earlier.answers_by_source[key]
        spent -= reports.seconds(earlier.first_token_by_source[key])
    return f"{spent / answers * 1000:.0f} ms" if answers else ""


def _flow(seen: Seen, before: Seen | None) -> Table:
    """What was computed, read, written, and went wrong."""
    counters = seen.stats.counters
    made = words.table(("",), ("total", "now"))
    for name, field, show in (
        ("prompt tokens computed", "prefilled_tokens", "{:,.0f}".format),
        ("read from disk", "bytes_loaded", size),
        ("KV written", "kv_bytes_written", size),
        ("agents that left RAM", "evictions", "{:,.0f}".format),
        ("files in quarantine", "quarantined", "{:,.0f}".format),
        ("commits that the disk refused", "commits_failed", "{:,.0f}".format),
    ):
        total: Any = getattr(counters, field)
        now = ""
        if before is not None:
            now = show((total - getattr(before.stats.counters, field)) / (seen.at - before.at)) + "/s"
        made.add_row(name, show(total), now)
    return made


def _busy(found: list[v1.Agent]) -> Table:
    made = words.table(("agent", "doing", ""), ("done", "of", "context"))
    for agent in found:
        many = bool(agent.tokens_total)
        made.add_row(
            agent.agent_id,
            reports.activity(agent.activity),
            reports.bar(agent.tokens_done, agent.tokens_total) if many else "",
            f"{agent.tokens_done:,}" if many else "",
            f"{agent.tokens_total:,}" if many else "",
            f"{agent.token_count:,}",
        )
    return made


def _load(gauges: v1.ServerGauges) -> str:
    running = f"{gauges.batch_size} request{'s' * (gauges.batch_size != 1)} at work"
    return f"{running}, {gauges.queue_depth} waiting"
