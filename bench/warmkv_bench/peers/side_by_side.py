"""The same prompts for every peer, in one run, interleaved."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from warmkv_bench.peers.peer import Completion, Peer, PeerFailed
from warmkv_bench.prompts import text_of_words
from warmkv_bench.stats import estimate
from warmkv_bench.tables import Table

SUFFIX_WORDS = 12


class Case(StrEnum):
    """COLD: nothing of the prompt was seen. AGAIN: all but a new end was. RESTARTED: it was, before a restart."""

    COLD = "cold"
    AGAIN = "same prefix"
    RESTARTED = "after a restart"


@dataclass(slots=True)
class PeerSample:
    """One request to one peer; times in milliseconds, None if it failed with `error`."""

    peer: str
    case: str
    context_tokens: int
    run: int
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What is asked: `runs` x `contexts` (tokens, as near as whole words come to it) x every Case."""

    contexts: tuple[int, ...]
    runs: int
    output_tokens: int
    seed: int

    async def run(
        self, peers: Sequence[Peer], count_tokens: Callable[[str], Awaitable[int]], say: Callable[[str], None]
    ) -> list[PeerSample]:
        """Asks every peer everything. The peers run all the time, but only one of them is asked at a time.

        Args:
            count_tokens: tokens of a text, for all peers, since the model is the same.
        """
        samples: list[PeerSample] = []
        for context in sorted(self.contexts):
            for run in range(1, self.runs + 1):
                prefix = await text_of_tokens(context, f"{self.seed}/{context}/{run}", count_tokens)
                order = list(peers)
                random.Random(f"{self.seed}/{context}/{run}").shuffle(order)
                for case in Case:
                    prompt = f"{prefix} {case}: {text_of_words(SUFFIX_WORDS, self.seed + run)}"
                    for peer in order:
                        sample = await self._ask(peer, case, context, run, prompt)
                        samples.append(sample)
                        say(_line(sample))
        mark_unequal(samples)
        return samples

    async def _ask(self, peer: Peer, case: Case, context: int, run: int, prompt: str) -> PeerSample:
        sample = PeerSample(peer.name, case, context, run)
        try:
            if case == Case.RESTARTED:
                await peer.stop()
                await peer.start()
            completion = await peer.ask(f"{context}.{run}", prompt, self.output_tokens)
        except PeerFailed as failure:
            sample.error = str(failure)
            return sample
        return _filled(sample, completion, self.output_tokens)


async def text_of_tokens(tokens: int, seed: str, count_tokens: Callable[[str], Awaitable[int]]) -> str:
    """Text of at most `tokens` tokens and at most one word less; texts of different seeds differ from the start."""
    words = f"{abs(hash_of(seed)):x} {text_of_words(tokens, hash_of(seed))}".split(" ")
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if await count_tokens(" ".join(words[:middle])) <= tokens:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def hash_of(seed: str) -> int:
    """A number that is the same in every process."""
    return random.Random(seed).getrandbits(40)


def mark_unequal(samples: list[PeerSample]) -> None:
    """Samples of one prompt must have one length; the first peer that answered says which."""
    lengths: dict[tuple[int, int, str], PeerSample] = {}
    for sample in samples:
        if sample.error is None:
            first = lengths.setdefault((sample.context_tokens, sample.run, sample.case), sample)
            if sample.prompt_tokens != first.prompt_tokens:
                sample.error = (
                    f"the prompt has {sample.prompt_tokens} tokens here, and {first.prompt_tokens} at {first.peer}"
                )


def peers_table(samples: Sequence[PeerSample]) -> Table:
    """Medians by context, case and peer."""
    rows = []
    for key in dict.fromkeys((sample.context_tokens, sample.case, sample.peer) for sample in samples):
        group = [sample for sample in samples if (sample.context_tokens, sample.case, sample.peer) == key]
        good = [sample for sample in group if sample.error is None]
        cached = [sample.cached_tokens for sample in good if sample.cached_tokens is not None]
        rows.append(
            (
                f"{key[0]:,}",
                key[1],
                key[2],
                _shown([sample.ttft_ms for sample in good]),
                _shown([sample.tpot_ms for sample in good]),
                f"{median(cached):,.0f} of {median(sample.prompt_tokens for sample in good):,.0f}" if cached else "-",
                str(len(good)),
                str(len(group) - len(good)),
            )
        )
    columns = ("Context", "Case", "Peer", "TTFT ms", "TPOT ms", "reused tokens", "samples", "failed")
    return Table("Side by side", columns, sorted(rows, key=_order), labels=3)


def peers_json(samples: Sequence[PeerSample], environment: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "environment": environment,
        "config": config,
        "samples": [asdict(sample) for sample in samples],
    }


def _filled(sample: PeerSample, completion: Completion, output_tokens: int) -> PeerSample:
    times = completion.piece_times_ms
    sample.prompt_tokens = completion.prompt_tokens
    sample.cached_tokens = completion.cached_tokens
    sample.output_tokens = completion.output_tokens
    if completion.output_tokens != output_tokens:
        sample.error = f"{completion.output_tokens} tokens came, must be {output_tokens}"
    elif len(times) < 2:
        sample.error = f"the answer came in {len(times)} pieces: it was not streamed"
    else:
        sample.ttft_ms = round(times[0], 3)
        # The mean: over a socket that waits for acknowledgements tokens come in bursts, and most gaps are none.
        sample.tpot_ms = round((times[-1] - times[0]) / (completion.output_tokens - 1), 3)
        sample.e2e_ms = round(times[-1], 3)
    return sample


def _shown(values: Sequence[float | None]) -> str:
    found = estimate([value for value in values if value is not None])
    if found is None:
        return "-"
    return f"{found.median:.1f}" + (f" ({found.least:.1f}-{found.most:.1f})" if found.n > 1 else "")


def _order(row: tuple[str, ...]) -> tuple[int, int, str]:
    cases = [str(case) for case in Case]
    return int(row[0].replace(",", "")), cases.index(row[1]), row[2]


def _line(sample: PeerSample) -> str:
    what = f"{sample.context_tokens:,} tokens, {sample.case}, run {sample.run}: {sample.peer}"
    if sample.error is not None or sample.ttft_ms is None:
        return f"{what} FAILED: {sample.error}"
    return f"{what} {sample.ttft_ms:.1f} ms to the first token, {sample.tpot_ms:.1f} ms between tokens"
