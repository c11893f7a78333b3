"""Takes pairs of samples of one request, hot and warm in turns, and others with the page cache dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from warmkv import v1 as pb
from warmkv_bench.client import AGENT_PREFIX, Answer, BrokenStream, Client, RequestFailed, generation, tokens_content
from warmkv_bench.config import ConfigError, State
from warmkv_bench.prompts import Prompts
from warmkv_bench.proof import SOURCES, Expectation, counter_faults, prime_faults, report_faults
from warmkv_bench.samples import STAGES, milliseconds
from warmkv_bench.states import DROPPED, NOT_CONTROLLED, Made, bring
from warmkv_bench.tiers.cold_read import files_of, read_ms, total_bytes

SOURCE = f"{AGENT_PREFIX}tiers"
PRIMED_AT_ONCE = 4096
COMPLETE, CUT_OFF = "complete", "interrupted"


@dataclass(slots=True)
class TierSample:
    """One ephemeral request of `suffix` new tokens behind `context_tokens` held ones; times in milliseconds.

    Attributes:
        pair: counts the pairs of one context from 0; a hot and a warm sample have the same number.
        page_cache: "dropped" or "not controlled" where it was to be dropped; else empty.
        server: the server's own stages in milliseconds.
        cold_read_ms: a plain read of the same files right before or after, their pages dropped as well.
        invalid_reason: what shows that this is no sample of its state; None if nothing does.
    """

    context_tokens: int
    state: str
    pair: int
    ttft_ms: float | None = None
    bytes_loaded: int = 0
    page_cache: str = ""
    server: dict[str, float] = field(default_factory=dict)
    output_ids: list[int] = field(default_factory=list)
    cold_read_ms: float | None = None
    invalid_reason: str | None = None


@dataclass(frozen=True, slots=True)
class TiersConfig:
    """
    Attributes:
        contexts: tokens held; shortened where the model's limit leaves no room for suffix and answer.
        pairs: of a hot and a warm sample at each size.
        dropped: samples with the page cache dropped at each size.
    """

    contexts: tuple[int, ...] = (1024, 4096, 8192, 16384, 32768)
    pairs: int = 20
    dropped: int = 7
    suffix_tokens: int = 32
    output_tokens: int = 2
    seed: int = 0
    keep: bool = False

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--contexts", min(self.contexts, default=0), 1),
            ("--pairs", self.pairs, 1),
            ("--dropped", self.dropped, 0),
        ):
            if value < least:
                raise ConfigError(f"{option} is {value}: it must be at least {least}")


class Tiers:
    """Measures on a server that nobody else uses.

    Args:
        data_dir: the server's, if it is on this machine: its files are read plainly for comparison.

    Attributes:
        status: "complete", "interrupted" until then, or "failed: why".
    """

    def __init__(self, client: Client, info: pb.GetServerInfoResponse, config: TiersConfig, data_dir: Path | None):
        self._client = client
        self._info = info
        self._config = config
        self._data_dir = data_dir
        self.samples: list[TierSample] = []
        self.problems: list[str] = []
        self.status = CUT_OFF

    async def run(self, prompts: Prompts, say: Callable[[str], None], measured: Callable[[], None]) -> None:
        """Primes the longest context once; every other size is a prefix of it, and computes nothing.

        Args:
            measured: called after each size.
        """
        config = self._config
        room = self._info.context_limit - config.suffix_tokens - config.output_tokens
        if room < 1:
            raise ConfigError(f"the model's limit of {self._info.context_limit} tokens leaves no room for a context")
        sizes = {context: min(context, room) for context in sorted(config.contexts)}
        tokens = prompts.tokens(0, max(sizes.values()))
        suffix = prompts.tokens(1, config.suffix_tokens)
        try:
            kept = await self._kept_tokens()
            for end in (*range(PRIMED_AT_ONCE, len(tokens), PRIMED_AT_ONCE), len(tokens)):
                if end < min(kept, len(tokens)):
                    continue  # a shorter prime would cut what an earlier run has left
                say(f"priming {end:,} of {len(tokens):,} tokens")
                await self._prime(SOURCE, tokens[:end])
            for context, held in sizes.items():
                await self._measure(context, tokens[:held], suffix)
                say(f"{context:,} tokens: {_line([s for s in self.samples if s.context_tokens == context])}")
                measured()
            self.status = COMPLETE
        except (RequestFailed, BrokenStream) as fault:
            self.problems.append(str(fault))
            self.status = f"failed: {fault}"
        finally:
            if not config.keep:
                await self._client.delete(SOURCE)

    async def _kept_tokens(self) -> int:
        """Tokens of the primed agent that an earlier run has left."""
        try:
            return (await self._client.agent(SOURCE)).token_count
        except RequestFailed as failed:
            if failed.code != grpc.StatusCode.NOT_FOUND:
                raise
            return 0

    async def _measure(self, context: int, held: list[int], suffix: list[int]) -> None:
        name = f"{SOURCE}.{context}"
        try:
            await self._prime(name, held)
            for state in (State.WARM, State.HOT):
                await self._ask(name, state, held, suffix)  # a warm-up: every path has been taken once
            orders = ((State.WARM, State.HOT), (State.HOT, State.WARM))
            plan = [(pair, state) for pair in range(self._config.pairs) for state in orders[pair % 2]]
            mine = [await self._sample(context, name, state, pair, held, suffix) for pair, state in plan]
            mine += [await self._dropped(context, name, n, held, suffix) for n in range(self._config.dropped)]
            _compare(mine)
            self.samples += mine
        finally:
            await self._client.delete(name)

    async def _prime(self, name: str, tokens: list[int]) -> None:
        reply = await self._client.prime(name, tokens_content(tokens))
        agent = await self._client.agent(name)
        durable = self._info.durability != pb.DURABILITY_NONE
        self.problems += prime_faults(reply, agent, len(tokens), computed=False, durable=durable)

    async def _dropped(self, context: int, name: str, number: int, held: list[int], suffix: list[int]) -> TierSample:
        """A sample with the pages dropped, and a plain read of the same files beside it, first one, then the other."""
        before = await self._cold_read(name, len(held)) if number % 2 else None
        sample = await self._sample(context, name, State.WARM_DROPPED, number, held, suffix)
        sample.cold_read_ms = before if number % 2 else await self._cold_read(name, len(held))
        return sample

    async def _cold_read(self, name: str, tokens: int) -> float | None:
        """None where the files can't be read, aren't exactly the agent's, or stay in the page cache."""
        if self._data_dir is None:
            return None
        reply = await self._client.evict(name, drop_page_cache=True)
        files = files_of(self._data_dir, tokens)
        if reply.resident_bytes_after != 0 or total_bytes(files) != reply.agent.warm_bytes:
            return None
        return read_ms(files)

    async def _sample(
        self, context: int, name: str, state: State, pair: int, held: list[int], suffix: list[int]
    ) -> TierSample:
        sample = TierSample(context, state, pair)
        try:
            made, answer, faults = await self._ask(name, state, held, suffix)
        except BrokenStream as broken:
            sample.invalid_reason = str(broken)
            return sample
        finished = answer.finished
        sample.ttft_ms = None if answer.first_delta_ms is None else round(answer.first_delta_ms, 3)
        sample.bytes_loaded = finished.cache.bytes_loaded
        sample.page_cache = made.page_cache
        sample.server = {stage: milliseconds(getattr(finished.timings, stage)) for stage in STAGES}
        sample.output_ids = answer.token_ids
        sample.invalid_reason = "; ".join(faults) or None
        return sample

    async def _ask(self, name: str, state: State, held: list[int], suffix: list[int]) -> tuple[Made, Answer, list[str]]:
        """Brings the agent into the state and sends the request; what shows that the one or the other went wrong."""
        client, config = self._client, self._config
        made = await bring(client, state, await client.agent(name), suffix)
        faults = list(made.faults)
        least = (1 - DROPPED) * made.stored_bytes
        if state == State.WARM and made.resident_bytes is not None and made.resident_bytes < least:
            faults.append(f"{made.resident_bytes} of {made.stored_bytes} bytes are in the page cache, must be all")
        before = (await client.stats()).counters
        request = generation(name, tokens_content(suffix), config.output_tokens, ephemeral=True)
        answer = await client.generate(request)
        after = (await client.stats()).counters
        report = answer.finished.cache
        warm = SOURCES[state] == pb.CACHE_SOURCE_WARM
        wanted = Expectation(
            source=SOURCES[state],
            prompt_tokens=len(held) + len(suffix),
            cached_tokens=len(held),
            output_tokens=config.output_tokens,
            loaded=(self._info.kv_bytes_per_token * len(held), made.stored_bytes) if warm else (0, 0),
            durable=False,
        )
        faults += report_faults(report, wanted) + counter_faults(before, after, [report])
        if len(answer.token_ids) != config.output_tokens:
            faults.append(f"{len(answer.token_ids)} tokens were streamed, must be {config.output_tokens}")
        return made, answer, faults


def _compare(samples: list[TierSample]) -> None:
    """Invalidates what broke the promise that one request on one context has one answer, wherever that is."""
    reference = next((sample for sample in samples if sample.state == State.HOT), None)
    for sample in samples:
        if reference is not None and sample.output_ids != reference.output_ids and sample.invalid_reason is None:
            sample.invalid_reason = "its answer is not that of the hot sample"


def _line(samples: list[TierSample]) -> str:
    shown: list[str] = []
    for state in (State.HOT, State.WARM, State.WARM_DROPPED):
        found: list[Any] = [sample.ttft_ms for sample in samples if sample.state == state and sample.ttft_ms]
        if found:
            shown.append(f"{state} {sorted(found)[len(found) // 2]:.1f} ms")
    bad = [sample.invalid_reason for sample in samples if sample.invalid_reason]
    uncontrolled = sum(sample.page_cache == NOT_CONTROLLED for sample in samples)
    if uncontrolled:
        shown.append(f"page cache not controlled in {uncontrolled}")
    return ", ".join([*shown, *([f"{len(bad)} invalid: {bad[0]}"] if bad else [])])
