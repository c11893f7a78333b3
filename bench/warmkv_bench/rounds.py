"""One round: makes every state of one repetition, measures it, and proves each sample."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from warmkv import v1 as pb
from warmkv_bench import predict
from warmkv_bench.client import AGENT_PREFIX, Answer, BrokenStream, RequestFailed, generation, tokens_content
from warmkv_bench.config import Isolation, MatrixConfig, Mode, State, prefix_tokens
from warmkv_bench.memory import MemoryRow, memory_row
from warmkv_bench.plan import Round
from warmkv_bench.prompts import Prompts
from warmkv_bench.proof import answer_faults, counter_faults, expectation, prime_faults
from warmkv_bench.results import Sample
from warmkv_bench.samples import agree, count_repeats, filled, invalid
from warmkv_bench.states import Made, bring
from warmkv_bench.target import Target

WARM_UP_TOKENS = 512


class SetupFault(Exception):
    """A step before the measurement did not do its work."""


# What a server can do wrong, as far as a client sees it.
FAULTS = (RequestFailed, BrokenStream, SetupFault)


@dataclass(slots=True)
class Outcome:
    """What a round gave: samples, seconds of each step as (step, seconds), and problems outside of any sample."""

    samples: list[Sample] = field(default_factory=list)
    steps: list[tuple[str, float]] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Member:
    """One request of a batch: the prefix that is held, and the suffix that is new, both as token ids."""

    name: str
    prefix: list[int]
    suffix: list[int]


class RoundRunner:
    """Runs rounds against a server that nobody else uses."""

    def __init__(
        self, target: Target, config: MatrixConfig, info: pb.GetServerInfoResponse, prompts: Prompts, run_id: str
    ) -> None:
        self._target = target
        self._config = config
        self._info = info
        self._prompts = prompts
        self._run_id = run_id
        self._durable = info.durability != pb.DURABILITY_NONE

    def prefix_tokens(self, round_: Round) -> int:
        return prefix_tokens(round_.context_tokens, self._config, self._info.context_limit)

    async def run(self, round_: Round, ordinal: int) -> Outcome:
        """Runs a round with the prompts `ordinal`, `ordinal + 1` and so on, one for each request of the batch.

        Whatever the server does wrong becomes an invalid sample; the round goes on with the next state.

        Raises:
            ServerFailed: the server that the benchmark started has died.
        """
        prefix = self.prefix_tokens(round_)
        members = [
            Member(
                name=f"{AGENT_PREFIX}{self._run_id}.{round_.key}.{index}",
                prefix=self._prompts.tokens(ordinal + index, prefix),
                suffix=self._prompts.tokens(ordinal + index + 1, self._config.suffix_tokens),
            )
            for index in range(round_.batch_size)
        ]
        outcome = Outcome()
        clock = _Clock(outcome)
        run = self._run_forked if round_.isolation == Isolation.FORK else self._run_strict
        try:
            await run(round_, members, outcome, clock)
        except FAULTS as fault:
            measured = len(outcome.samples) // round_.batch_size
            outcome.samples += self._invalid(round_, round_.states[measured:], str(fault))
            self._target.raise_if_dead()
        count_repeats(outcome.samples)
        if round_.batch_size == 1:
            agree(outcome.samples)
        return outcome

    async def _run_forked(self, round_: Round, members: list[Member], outcome: Outcome, clock: _Clock) -> None:
        """One prime for all states; a cold sample, on the agent that becomes the source of the forks, pays for it."""
        sources = [member.name for member in members]
        before = (await self._target.client.stats()).gauges
        async with self._agents(sources, outcome):
            if State.COLD in round_.states:
                outcome.samples += await self._cold(round_, members, sources, clock)
            others = [state for state in round_.states if state != State.COLD]
            try:
                if others:
                    await self._prime(round_, members, sources, outcome, clock, before, computed=False)
            except FAULTS as fault:
                outcome.samples += self._invalid(round_, others, f"prime: {fault}")
                return
            for number, state in enumerate(others):
                forks = [f"{source}.{state}.{number}" for source in sources]
                async with self._agents(forks, outcome):
                    begin = time.perf_counter()
                    try:
                        client = self._target.client
                        agents = [await client.fork(*pair) for pair in zip(sources, forks, strict=True)]
                        outcome.samples += await self._warm_or_hot(round_, state, members, agents, begin)
                    except FAULTS as fault:
                        outcome.samples += self._invalid(round_, [state], f"set-up: {fault}")
                clock.lap(state)

    async def _run_strict(self, round_: Round, members: list[Member], outcome: Outcome, clock: _Clock) -> None:
        """Every state on agents of its own, primed from nothing."""
        for number, state in enumerate(round_.states):
            names = [f"{member.name}.{state}.{number}" for member in members]
            async with self._agents(names, outcome):
                begin = time.perf_counter()
                if state == State.COLD:
                    outcome.samples += await self._cold(round_, members, names, clock)
                    continue
                try:
                    before = (await self._target.client.stats()).gauges
                    await self._prime(round_, members, names, outcome, clock, before, computed=True)
                    agents = [await self._target.client.agent(name) for name in names]
                    outcome.samples += await self._warm_or_hot(round_, state, members, agents, begin)
                except FAULTS as fault:
                    outcome.samples += self._invalid(round_, [state], f"set-up: {fault}")
            clock.lap(state)

    async def _cold(self, round_: Round, members: list[Member], names: Sequence[str], clock: _Clock) -> list[Sample]:
        contents = [tokens_content(member.prefix + member.suffix) for member in members]
        samples = await self._measure(round_, State.COLD, [Made(name) for name in names], contents, 0.0)
        first_tokens = [sample.server.get("first_token", 0.0) for sample in samples]
        clock.split(State.COLD, predict.PREFILL, max(first_tokens) / 1e3)
        return samples

    async def _prime(
        self,
        round_: Round,
        members: list[Member],
        names: Sequence[str],
        outcome: Outcome,
        clock: _Clock,
        before: pb.ServerGauges,
        *,
        computed: bool,
    ) -> None:
        """Makes the agents' contexts exactly the prefixes; raises SetupFault if one is not what it must be.

        `before` are the gauges from before the agents were made.
        """
        client = self._target.client
        prefill_s = 0.0
        for member, name in zip(members, names, strict=True):
            reply = await client.prime(name, tokens_content(member.prefix))
            held = await client.agent(name)
            faults = prime_faults(reply, held, len(member.prefix), computed=computed, durable=self._durable)
            if faults:
                raise SetupFault("; ".join(faults))
            if not reply.cache.cached_tokens:
                prefill_s += reply.timings.prefill.ToTimedelta().total_seconds()
        if round_.batch_size == 1:
            outcome.memory.append(self._memory(round_, held, before, (await client.stats()).gauges))
        clock.split(predict.PRIME, predict.PREFILL if prefill_s else None, prefill_s)

    async def _warm_or_hot(
        self, round_: Round, state: State, members: list[Member], agents: list[pb.Agent], begin: float
    ) -> list[Sample]:
        client = self._target.client
        pairs = zip(agents, members, strict=True)
        made = [await bring(client, state, agent, member.suffix) for agent, member in pairs]
        if state == State.RESTART:
            await self._target.restart()
        setup_ms = (time.perf_counter() - begin) * 1e3
        samples = await self._measure(
            round_, state, made, [tokens_content(member.suffix) for member in members], setup_ms
        )
        if state == State.RESTART:
            await self._warm_up(members[0])
        return samples

    async def _warm_up(self, member: Member) -> None:
        """Pays what a new process's first prefill costs, so that the next round's cold sample does not."""
        prompt = tokens_content(member.prefix[:WARM_UP_TOKENS])
        await self._target.client.generate(generation("", prompt, 2))

    async def _measure(
        self, round_: Round, state: State, made: list[Made], contents: list[pb.Content], setup_ms: float
    ) -> list[Sample]:
        """Releases the requests of a batch together, and proves what came back."""
        client = self._target.client
        requests = [
            generation(one.agent_id, content, self._config.output_tokens, final=round_.mode == Mode.FINAL)
            for one, content in zip(made, contents, strict=True)
        ]
        before = await client.stats()
        results = await asyncio.gather(*(client.generate(request) for request in requests), return_exceptions=True)
        answers: list[Answer] = []
        failures: list[str] = []
        for result in results:
            if isinstance(result, (RequestFailed, BrokenStream)):
                failures.append(str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                answers.append(result)
        if failures:
            self._target.raise_if_dead()
            return self._invalid(round_, [state], "; ".join(failures))
        after = await client.stats()
        reports = [answer.finished.cache for answer in answers]
        counted = counter_faults(before.counters, after.counters, reports)
        prefix = self.prefix_tokens(round_)
        samples: list[Sample] = []
        slowest_s = max(answer.e2e_ms for answer in answers) / 1e3
        for index, (one, answer) in enumerate(zip(made, answers, strict=True)):
            wanted = expectation(
                state,
                prefix,
                self._config.suffix_tokens,
                self._config.output_tokens,
                self._info,
                one.stored_bytes,
            )
            faults = one.faults + answer_faults(answer, wanted, round_.mode) + counted
            sample = filled(self._blank(round_, state, index), answer, faults)
            sample.page_cache = one.page_cache
            sample.resident_bytes = one.resident_bytes
            sample.setup_ms = setup_ms
            sample.batch_tokens_per_s = sum(len(each.token_ids) for each in answers) / slowest_s
            sample.kv_bytes_written = after.counters.kv_bytes_written - before.counters.kv_bytes_written
            sample.metadata_bytes_written = (
                after.counters.metadata_bytes_written - before.counters.metadata_bytes_written
            )
            samples.append(sample)
        return samples

    def _blank(self, round_: Round, state: State, index: int) -> Sample:
        return Sample(
            context_tokens=round_.context_tokens,
            prefix_tokens=self.prefix_tokens(round_),
            suffix_tokens=self._config.suffix_tokens,
            state=state,
            mode=round_.mode,
            batch_size=round_.batch_size,
            batch_index=index,
            run=round_.run,
            isolation=round_.isolation,
            purpose=round_.purpose,
            round_key=round_.key,
        )

    def _invalid(self, round_: Round, states: Sequence[State], reason: str) -> list[Sample]:
        return [
            invalid(self._blank(round_, state, index), reason) for state in states for index in range(round_.batch_size)
        ]

    def _memory(self, round_: Round, held: pb.Agent, before: pb.ServerGauges, after: pb.ServerGauges) -> MemoryRow:
        target = self._target
        return memory_row(round_.context_tokens, held, self._info, before, after, target.data_dir, target.pid)

    @asynccontextmanager
    async def _agents(self, names: Sequence[str], outcome: Outcome) -> AsyncIterator[None]:
        """Deletes the agents at the end, however it comes; one that cannot be deleted is a problem of the run."""
        try:
            yield
        finally:
            for name in names:
                try:
                    await self._target.client.delete(name)
                except RequestFailed as failure:
                    outcome.problems.append(f"{name}: {failure}")


class _Clock:
    """Divides a round's time among its steps without a gap."""

    def __init__(self, outcome: Outcome) -> None:
        self._steps = outcome.steps
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        self.split(step, None, 0.0)

    def split(self, step: str, part: str | None, part_s: float) -> None:
        """Ends a step, of whose time `part_s` seconds belong to another one."""
        now = time.perf_counter()
        whole_s = now - self._last
        self._last = now
        if part is not None and 0 < part_s < whole_s:
            self._steps += [(step, whole_s - part_s), (part, part_s)]
        else:
            self._steps.append((step, whole_s))
