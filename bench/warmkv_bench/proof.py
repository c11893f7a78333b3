"""What a reply and the server's counters must say before a sample counts.

The reply says what the executed path did. The counters are kept elsewhere in the server, and the size of a stored token
is known from GetServerInfo; a report that claims what did not happen has to get all of them wrong in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from warmkv import v1 as pb
from warmkv_bench.client import Answer
from warmkv_bench.config import Mode, State

SOURCES: dict[State, pb.CacheSource.ValueType] = {
    State.COLD: pb.CACHE_SOURCE_COLD,
    State.WARM: pb.CACHE_SOURCE_WARM,
    State.WARM_DROPPED: pb.CACHE_SOURCE_WARM,
    State.HOT: pb.CACHE_SOURCE_HOT,
    State.RESTART: pb.CACHE_SOURCE_WARM,
}


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the measured request was set up to do. Counts are tokens; `loaded` is the least and most bytes read."""

    source: pb.CacheSource.ValueType
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    loaded: tuple[int, int]
    durable: bool


def expectation(
    state: State, prefix: int, suffix: int, output: int, info: pb.GetServerInfoResponse, stored_bytes: int
) -> Expectation:
    """What a request for `prefix` held and `suffix` new tokens must report.

    A warm request must have read at least what `kv_bytes_per_token` makes of its prefix, and at most `stored_bytes`,
    the `warm_bytes` of the agent.
    """
    source = SOURCES[state]
    least = info.kv_bytes_per_token * prefix
    return Expectation(
        source=source,
        prompt_tokens=prefix + suffix,
        cached_tokens=0 if state == State.COLD else prefix,
        output_tokens=output,
        loaded=(least, stored_bytes) if source == pb.CACHE_SOURCE_WARM else (0, 0),
        durable=info.durability != pb.DURABILITY_NONE,
    )


def report_faults(report: pb.CacheReport, wanted: Expectation) -> list[str]:
    """Everything in a CacheReport that differs from what the request was set up to do."""
    faults: list[str] = []

    def must(what: str, got: int, want: int) -> None:
        if got != want:
            faults.append(f"{what} is {got}, must be {want}")

    if report.source != wanted.source:
        faults.append(f"source is {source_name(report.source)}, must be {source_name(wanted.source)}")
    must("prompt_tokens", report.prompt_tokens, wanted.prompt_tokens)
    must("cached_tokens", report.cached_tokens, wanted.cached_tokens)
    must("prefilled_tokens", report.prefilled_tokens, wanted.prompt_tokens - wanted.cached_tokens)
    warm = wanted.cached_tokens if wanted.source == pb.CACHE_SOURCE_WARM else 0
    must("warm_tokens", report.warm_tokens, warm)
    must("hot_tokens", report.hot_tokens, wanted.cached_tokens - warm)
    must("shared_tokens", report.shared_tokens, 0)
    least, most = wanted.loaded
    if not least <= report.bytes_loaded <= most:
        faults.append(f"bytes_loaded is {report.bytes_loaded}, must be {least} to {most}")
    if report.fallback_reason:
        faults.append(f"fell back: {pb.FallbackReason.Name(report.fallback_reason)}")
    return faults


def answer_faults(answer: Answer, wanted: Expectation, mode: Mode) -> list[str]:
    """Everything in an answer that makes it no sample of its state."""
    finished = answer.finished
    faults = report_faults(finished.cache, wanted)
    tokens = len(answer.token_ids)
    if tokens != wanted.output_tokens:
        faults.append(f"{tokens} tokens were streamed, must be {wanted.output_tokens}")
    if finished.usage.completion_tokens != tokens:
        faults.append(f"usage counts {finished.usage.completion_tokens} tokens, but {tokens} were streamed")
    if mode == Mode.FINAL and answer.deltas != 1:
        faults.append(f"the final answer came in {answer.deltas} deltas, must be 1")
    if mode == Mode.STREAMING and answer.deltas < tokens:
        faults.append(f"{tokens} tokens came in {answer.deltas} deltas, must be one each")
    held = finished.agent.token_count
    if held != wanted.prompt_tokens + wanted.output_tokens:
        faults.append(f"the agent holds {held} tokens afterwards, must be prompt and answer")
    if wanted.durable and not finished.persisted:
        faults.append("the commit is not durable")
    return faults


def counter_faults(before: pb.ServerCounters, after: pb.ServerCounters, reports: Sequence[pb.CacheReport]) -> list[str]:
    """Differences between what the server counted meanwhile and what its replies report.

    The counters are the server's, so the benchmark needs the server to itself.
    """
    faults: list[str] = []

    def must(what: str, got: int, want: int) -> None:
        if got != want:
            faults.append(f"the server counted {got} {what}, its replies say {want}")

    for source in pb.CacheSource.values():
        name = pb.CacheSource.Name(source)
        counted = after.requests_by_source[name] - before.requests_by_source[name]
        must(f"requests from {source_name(source)}", counted, sum(r.source == source for r in reports))
    must("bytes loaded", after.bytes_loaded - before.bytes_loaded, sum(r.bytes_loaded for r in reports))
    must("prefilled tokens", after.prefilled_tokens - before.prefilled_tokens, sum(r.prefilled_tokens for r in reports))
    must("hot tokens", after.hot_tokens_reused - before.hot_tokens_reused, sum(r.hot_tokens for r in reports))
    must("warm tokens", after.warm_tokens_reused - before.warm_tokens_reused, sum(r.warm_tokens for r in reports))
    must("files put into quarantine", after.quarantined - before.quarantined, 0)
    must("failed commits", after.commits_failed - before.commits_failed, 0)
    return faults


def prime_faults(reply: pb.PrimeResponse, held: pb.Agent, tokens: int, *, computed: bool, durable: bool) -> list[str]:
    """Everything that shows that a Prime did not do its work.

    Args:
        held: the agent as GetAgent returns it afterwards.
        computed: the prime had to compute every token (strict isolation).
        durable: the server's durability makes commits `persisted`.
    """
    faults: list[str] = []
    for where, agent in (("Prime returned", reply.agent), ("GetAgent returned", held)):
        if agent.token_count != tokens:
            faults.append(f"{where} an agent of {agent.token_count} tokens after a prime of {tokens}")
    if reply.cache.prompt_tokens != tokens:
        faults.append(f"the prime reports {reply.cache.prompt_tokens} prompt tokens, must be {tokens}")
    if computed and reply.cache.cached_tokens:
        faults.append(f"the prime reused {reply.cache.cached_tokens} tokens, must compute all")
    if durable and not reply.persisted:
        faults.append("the primed context is not durable")
    return faults


def source_name(source: pb.CacheSource.ValueType) -> str:
    return pb.CacheSource.Name(source).removeprefix("CACHE_SOURCE_")
