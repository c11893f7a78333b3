"""The traffic: many agents, each asked for one random thing after another, and what their contexts must be by now."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from warmkv import v1 as pb
from warmkv_bench.client import AGENT_PREFIX, Client, RequestFailed, tokens_content
from warmkv_bench.prompts import Prompts
from warmkv_bench.soak.calls import Reply, ask

LONGEST_PRIME, LONGEST_CONTEXT, LONGEST_SUFFIX, LONGEST_ANSWER = 700, 1200, 64, 24
"""Tokens."""

LONGEST_PATIENCE_S = 0.4
"""A Generate that is given up is so within this time: while it waits, loads, prefills, decodes or commits."""

WEIGHTS = {
    "generate": 42,
    "give up": 14,
    "extend": 10,
    "prime": 8,
    "fork": 8,
    "evict": 8,
    "delete": 5,
    "delete while answering": 5,
}


@dataclass(eq=False, slots=True)
class Held:
    """An agent. `tokens` is what its context must be now; None: there must be no such agent."""

    agent_id: str
    tokens: list[int] | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class Sample:
    """A greedy answer, to be asked for again when nothing else runs."""

    prompt: list[int]
    answer: list[int]
    source: str


class Broken(Exception):
    """A request ended as it must not."""


class Traffic:
    """Sends requests until told to stop.

    Attributes:
        counts: of requests, by kind.
        outcomes: what they came to.
        sources: of the KV that answers began from.
        breaches: what must not happen, in words.
        samples: answers to check, at most `most_samples`, spread over the whole run.
    """

    def __init__(self, client: Client, prompts: Prompts, agents: int, seed: int, most_samples: int) -> None:
        self._client = client
        self._prompts = prompts
        self._rng = random.Random(seed)
        self._ordinal = 0
        self._answers = 0
        self._most_samples = most_samples
        self.agents = [Held(f"{AGENT_PREFIX}soak.{number}") for number in range(agents)]
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.breaches: list[str] = []
        self.samples: list[Sample] = []

    @property
    def requests(self) -> int:
        return self.counts.total()

    async def one(self) -> None:
        """One random request to one random agent, in that agent's turn."""
        held = self._rng.choice(self.agents)
        async with held.turn:
            kind = "prime" if held.tokens is None and self._rng.random() < 0.5 else self._kind()
            if held.tokens is None and kind in ("extend", "fork", "evict"):
                kind = "generate"
            if held.tokens is not None and len(held.tokens) > LONGEST_CONTEXT:
                kind = "prime"
            self.counts[kind] += 1
            work: dict[str, Callable[[Held], Awaitable[None]]] = {
                "generate": self._generate,
                "give up": self._give_up,
                "extend": self._extend,
                "prime": self._prime,
                "fork": self._fork,
                "evict": self._evict,
                "delete": self._delete,
                "delete while answering": self._delete_while_answering,
            }
            try:
                await work[kind](held)
            except (RequestFailed, Broken) as failure:
                self._breach(held, kind, str(failure))
                await self._begin_anew(held)

    def _kind(self) -> str:
        return self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    async def _generate(self, held: Held) -> None:
        request = self._request(held)
        self._take(held, request, await ask(self._client, request), "generate")
        await self._check(held, "generate")

    async def _give_up(self, held: Held) -> None:
        """Give it up, and ask again with the same request id, which tells what has become of it."""
        request = self._request(held)
        request.request_id = f"{held.agent_id}.{self._ordinal}"
        first = await ask(self._client, request, self._rng.uniform(0, LONGEST_PATIENCE_S))
        self.outcomes["given up" if first.given_up else first.error or "OK"] += 1
        again = await ask(self._client, request)
        if again.tokens[: len(first.tokens)] != first.tokens:
            self._breach(held, "give up", f"a retry replays {again.tokens}, and {first.tokens} had been sent")
        if again.reason == "REQUEST_CANCELLED":
            self.outcomes["replayed what was cancelled"] += 1
            held.tokens = [*_prompt(held, request), *again.tokens]
        else:
            self._take(held, request, again, "retry")
        await self._check(held, "give up")

    async def _extend(self, held: Held) -> None:
        suffix = self._suffix()
        held.tokens = [*(held.tokens or []), *suffix]
        await self._client.extend(held.agent_id, tokens_content(suffix))
        self.outcomes["OK"] += 1
        await self._check(held, "extend")

    async def _prime(self, held: Held) -> None:
        """A new context, or a cut of the one that is there."""
        if held.tokens is not None and len(held.tokens) > 1 and self._rng.random() < 0.4:
            tokens = held.tokens[: self._rng.randint(1, min(len(held.tokens), LONGEST_PRIME))]
        else:
            tokens = self._new(self._rng.randint(1, LONGEST_PRIME))
        held.tokens = tokens
        await self._client.prime(held.agent_id, tokens_content(tokens))
        self.outcomes["OK"] += 1
        await self._check(held, "prime")

    async def _fork(self, held: Held) -> None:
        """Over an agent whose turn is free; what it was is deleted first."""
        target = self._rng.choice(self.agents)
        if target.turn.locked():
            return
        async with target.turn:
            target.tokens = None
            await self._client.delete(target.agent_id)
            await self._client.fork(held.agent_id, target.agent_id)
            target.tokens = list(held.tokens or [])
            self.outcomes["OK"] += 1
            await self._check(target, "fork")

    async def _evict(self, held: Held) -> None:
        await self._client.evict(held.agent_id)
        self.outcomes["OK"] += 1

    async def _delete(self, held: Held) -> None:
        held.tokens = None
        await self._client.delete(held.agent_id)
        self.outcomes["OK"] += 1

    async def _delete_while_answering(self, held: Held) -> None:
        """The delete wins, whatever the answer has come to."""
        answering = asyncio.create_task(ask(self._client, self._request(held)))
        await asyncio.sleep(self._rng.uniform(0.005, LONGEST_PATIENCE_S))
        held.tokens = None
        await self._client.delete(held.agent_id)
        reply = await answering
        self.outcomes[reply.reason or reply.error or "OK"] += 1
        if reply.error is not None and reply.reason != "AGENT_DELETED":
            self._breach(held, "delete while answering", f"the answer ended {reply.error} {reply.reason}")
        await self._check(held, "delete")

    def _request(self, held: Held) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(temperature=0.0)
        if self._rng.random() < 0.25:
            sampling = pb.SamplingParams(temperature=0.9, top_p=0.9, seed=self._rng.getrandbits(32))
        return pb.GenerateRequest(
            agent_id=held.agent_id,
            content=tokens_content(self._suffix()),
            sampling=sampling,
            max_tokens=self._rng.randint(1, LONGEST_ANSWER),
            ignore_eos=self._rng.random() < 0.5,
            top_logprobs=self._rng.choice((0, 0, 2)),
        )

    def _take(self, held: Held, request: pb.GenerateRequest, reply: Reply, kind: str) -> None:
        """Account for an answer that must have come to its end."""
        self.outcomes[reply.error or "OK"] += 1
        if reply.finished is None:
            raise Broken(f"it ended {reply.error} {reply.reason}")
        prompt, cache = _prompt(held, request), reply.finished.cache
        held.tokens = [*prompt, *reply.tokens]
        self.sources[pb.CacheSource.Name(cache.source).removeprefix("CACHE_SOURCE_")] += 1
        if cache.prompt_tokens != len(prompt) or cache.cached_tokens + cache.prefilled_tokens != len(prompt):
            self._breach(held, kind, f"the prompt has {len(prompt)} tokens, and the report says {cache}")
        if reply.finished.usage.completion_tokens != len(reply.tokens):
            self._breach(held, kind, f"{len(reply.tokens)} tokens came, and the usage says {reply.finished.usage}")
        if not request.sampling.temperature:
            sample = Sample(prompt, reply.tokens, pb.CacheSource.Name(cache.source))
            self._answers += 1  # reservoir sampling: every answer has the same chance
            if len(self.samples) < self._most_samples:
                self.samples.append(sample)
            elif (place := self._rng.randrange(self._answers)) < self._most_samples:
                self.samples[place] = sample

    async def _check(self, held: Held, kind: str) -> None:
        """The server must hold as many tokens as were committed, or no agent."""
        found = await self._length(held)
        expected = None if held.tokens is None else len(held.tokens)
        if found != expected:
            self._breach(held, kind, f"the agent has {found} tokens and must have {expected}")
            await self._begin_anew(held)

    async def _length(self, held: Held) -> int | None:
        try:
            return (await self._client.agent(held.agent_id)).token_count
        except RequestFailed as failure:
            if failure.code.name != "NOT_FOUND":
                raise
            return None

    async def _begin_anew(self, held: Held) -> None:
        """After a breach nothing is known of the agent, and one breach is not to be counted twice."""
        held.tokens = None
        await self._client.delete(held.agent_id)

    def _breach(self, held: Held, kind: str, what: str) -> None:
        self.breaches.append(f"{kind} of {held.agent_id}: {what}")

    def _suffix(self) -> list[int]:
        return self._new(self._rng.randint(1, LONGEST_SUFFIX))

    def _new(self, count: int) -> list[int]:
        self._ordinal += 1
        return self._prompts.tokens(self._ordinal, count)


def _prompt(held: Held, request: pb.GenerateRequest) -> list[int]:
    return [*(held.tokens or []), *request.content.token_ids.ids]
