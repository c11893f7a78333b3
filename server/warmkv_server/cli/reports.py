"""What a server says of an agent and of a request, in a line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from warmkv_server.offline.words import ago, size, table

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from rich.table import Table

    from warmkv import v1

_BAR = 20


def as_json(message: Message) -> Any:
    """With every field, also those that are zero."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def source(number: v1.CacheSource.ValueType) -> str:
    from warmkv import v1

    return v1.CacheSource.Name(number).removeprefix("CACHE_SOURCE_").lower()


def activity(number: v1.Activity.ValueType) -> str:
    from warmkv import v1

    return v1.Activity.Name(number).removeprefix("ACTIVITY_").lower()


def tier(number: v1.Tier.ValueType) -> str:
    from warmkv import v1

    return v1.Tier.Name(number).removeprefix("TIER_").lower()


def milliseconds(duration: Duration) -> str:
    value = seconds(duration) * 1000
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def reuse(cache: v1.CacheReport) -> list[str]:
    """Where the context came from, how much of it, and how much of that was read."""
    from warmkv import v1

    words = [source(cache.source), f"{cache.cached_tokens:,} reused, {cache.prefilled_tokens:,} computed"]
    words += [f"{size(cache.bytes_loaded)} read"] if cache.bytes_loaded else []
    if cache.fallback_reason:
        reason = v1.FallbackReason.Name(cache.fallback_reason).removeprefix("FALLBACK_REASON_")
        words.append(f"less than expected: {reason.lower().replace('_', ' ')}")
    return words


def kept(persisted: bool) -> str:
    return "persisted" if persisted else "NOT persisted"


def computed(what: v1.PrimeResponse | v1.ExtendResponse) -> str:
    """The line behind a Prime or an Extend."""
    agent = what.agent
    head = f"{agent.agent_id}: {agent.token_count:,} tokens at revision {agent.revision}"
    spent = f"prefill {milliseconds(what.timings.prefill)}"
    return " · ".join([head, *reuse(what.cache), spent, kept(what.persisted)])


def answered(finished: v1.GenerateFinished) -> str:
    """The line behind an answer."""
    from warmkv import v1

    tokens, decode = finished.usage.completion_tokens, seconds(finished.timings.decode)
    words = [*reuse(finished.cache), f"first token {milliseconds(finished.timings.first_token)}"]
    if tokens > 1 and decode:
        words.append(f"{(tokens - 1) / decode:.0f} tokens/s")
    if finished.finish_reason == v1.FINISH_REASON_LENGTH:
        words.append(f"ended after {tokens:,} tokens, its limit")
    return " · ".join([*words, kept(finished.persisted)])


def agents(found: Iterable[v1.Agent]) -> Table:
    made = table(("agent", "tier"), ("tokens", "revision", "in RAM", "on disk", "shared", "pinned", "used", "now"))
    for agent in found:
        stale = " (stale)" if agent.stale_tokens else ""
        made.add_row(
            agent.agent_id,
            tier(agent.tier),
            f"{agent.token_count:,}{stale}",
            str(agent.revision),
            size(agent.hot_bytes),
            size(agent.warm_bytes),
            size(agent.shared_bytes),
            "yes" if agent.pinned else "",
            ago(time.time() - agent.last_used_time.ToSeconds()) if agent.revision else "",
            doing(agent),
        )
    return made


def doing(agent: v1.Agent) -> str:
    """What is done for an agent, and how far it is."""
    far = f" {agent.tokens_done:,}/{agent.tokens_total:,}" if agent.tokens_total else ""
    return activity(agent.activity) + far


def agent(found: v1.Agent) -> list[tuple[str, str]]:
    """Rows of a topic and what there is to say."""
    shared = f", {size(found.shared_bytes)} of them other agents' too" if found.shared_bytes else ""
    rows = [
        ("agent", found.agent_id),
        ("context", f"{found.token_count:,} tokens at revision {found.revision}"),
    ]
    if not found.revision:  # it has nothing else yet
        return [*rows, ("now", doing(found))]
    rows += [
        ("KV", f"{tier(found.tier)}: {size(found.hot_bytes)} in RAM, {size(found.warm_bytes)} on disk{shared}"),
        ("now", doing(found)),
        ("pinned", "yes" if found.pinned else "no"),
        ("created", _time(found.create_time.ToSeconds())),
        ("last used", _time(found.last_used_time.ToSeconds())),
    ]
    if found.HasField("expire_time"):
        rows.append(("expires", _time(found.expire_time.ToSeconds())))
    if found.labels:
        rows.append(("labels", ", ".join(f"{key}={value}" for key, value in sorted(found.labels.items()))))
    if found.parent_agent_id:
        rows.append(("forked from", found.parent_agent_id))
    if found.stale_tokens:
        why = ", ".join(found.fingerprint_differences) or "it isn't known any more how it differs"
        rows.append(("stale", f"{found.stale_tokens:,} tokens can't be used with this model: {why}"))
    return rows


def bar(done: int, total: int, width: int = _BAR) -> str:
    filled = round(width * min(done / total, 1.0)) if total else 0
    return "█" * filled + "░" * (width - filled)


def _time(at: int) -> str:
    shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    return f"{shown} ({ago(time.time() - at)})" if at <= time.time() else shown
