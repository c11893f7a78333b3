"""Everything that a report says in numbers, derived from the verified samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from operator import attrgetter
from statistics import median
from typing import Any

from warmkv_bench.config import Isolation, Mode, State
from warmkv_bench.plan import Purpose
from warmkv_bench.results import Results, Sample
from warmkv_bench.samples import leading_agreement
from warmkv_bench.stats import Estimate, Ratio, estimate, paired_ratio, unpaired_ratio, verdict

METRICS = (
    "ttft_ms",
    "itl_ms",
    "tpot_ms",
    "last_token_ms",
    "e2e_ms",
    "tokens_per_s",
    "batch_tokens_per_s",
    "bytes_loaded",
    "setup_ms",
)
STAGES = ("queue", "load", "prefill", "first_token", "decode", "commit")
RATIOS = (
    (State.COLD, State.WARM),
    (State.COLD, State.WARM_DROPPED),
    (State.COLD, State.HOT),
    (State.COLD, State.RESTART),
    (State.HOT, State.WARM),
)
CROSS_CHECK_TOLERANCE = 0.10

GroupKey = tuple[str, int, str, int, str, str, str]


def group_key(sample: Sample) -> GroupKey:
    """What samples have in common that are repetitions of each other."""
    return (
        sample.purpose,
        sample.context_tokens,
        sample.mode,
        sample.batch_size,
        sample.state,
        sample.page_cache,
        sample.isolation,
    )


def latency_ms(sample: Sample) -> float | None:
    """Time to first token; for a final answer, the time until it is there."""
    return sample.e2e_ms if sample.mode == Mode.FINAL else sample.ttft_ms


def summarise(results: Results) -> dict[str, Any]:
    """The `summary` of results.json."""
    samples = results.samples
    matrix = [sample for sample in samples if sample.verified and sample.purpose != Purpose.CROSS_CHECK]
    return {
        "samples": len(samples),
        "verified": len(samples) - len(results.invalid),
        "invalid": len(results.invalid),
        "groups": _groups(samples),
        "ratios": _ratios(matrix),
        "answers": _answers(matrix),
        "cross_check": _cross_check(samples),
    }


def _groups(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    members: dict[GroupKey, list[Sample]] = defaultdict(list)
    for sample in samples:
        members[group_key(sample)].append(sample)
    groups: list[dict[str, Any]] = []
    for (purpose, context, mode, batch, state, page_cache, isolation), all_of_it in members.items():
        verified = [sample for sample in all_of_it if sample.verified]
        groups.append(
            {
                "purpose": purpose,
                "context_tokens": context,
                "prefix_tokens": all_of_it[0].prefix_tokens,
                "mode": mode,
                "batch_size": batch,
                "state": state,
                "page_cache": page_cache,
                "isolation": isolation,
                "invalid": len(all_of_it) - len(verified),
                "metrics": {
                    **{name: _known(verified, attrgetter(name)) for name in METRICS},
                    **{f"server_{stage}_ms": _known(verified, _stage(stage)) for stage in STAGES},
                },
            }
        )
    return groups


def _known(samples: Iterable[Sample], value: Callable[[Sample], float | None]) -> dict[str, Any] | None:
    """Estimate of a value over the samples that have it."""
    return _json(estimate([known for sample in samples if (known := value(sample)) is not None]))


def _stage(name: str) -> Callable[[Sample], float | None]:
    return lambda sample: sample.server.get(name)


def _ratios(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Ratios of latencies, paired by round and place in the batch; a pair holds the medians of its repeats."""
    wheres: dict[tuple[int, str, int, str], dict[tuple[str, int], dict[str, list[float]]]] = defaultdict(dict)
    for sample in samples:
        latency = latency_ms(sample)
        if latency is not None:
            where = (sample.context_tokens, sample.mode, sample.batch_size, sample.isolation)
            states = wheres[where].setdefault((sample.round_key, sample.batch_index), {})
            states.setdefault(sample.state, []).append(latency)
    found: list[dict[str, Any]] = []
    for (context, mode, batch, isolation), by_round in wheres.items():
        for above, below in RATIOS:
            both = [states for states in by_round.values() if above in states and below in states]
            ratio = paired_ratio([median(s[above]) for s in both], [median(s[below]) for s in both])
            if ratio is not None:
                found.append(
                    {
                        "context_tokens": context,
                        "mode": mode,
                        "batch_size": batch,
                        "isolation": isolation,
                        "measure": "e2e_ms" if mode == Mode.FINAL else "ttft_ms",
                        "numerator": above,
                        "denominator": below,
                        **asdict(ratio),
                    }
                )
    return found


def _answers(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """How far the answers of one round agree with its hot one: the part of the tokens before the first difference."""
    rounds: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        rounds[sample.round_key, sample.batch_index].append(sample)
    shares: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    for of_round in rounds.values():
        hot = next((sample for sample in of_round if sample.state == State.HOT), None)
        for sample in of_round:
            if hot is not None and sample is not hot:
                same = leading_agreement(sample.output_ids, hot.output_ids) / len(hot.output_ids)
                shares[sample.context_tokens, sample.batch_size, sample.state].append(same)
    return [
        {
            "context_tokens": context,
            "batch_size": batch,
            "state": state,
            "compared": len(values),
            "equal": sum(value == 1 for value in values),
            "median_leading_agreement": median(values),
        }
        for (context, batch, state), values in shares.items()
    ]


def _cross_check(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Fork isolation against strict isolation, by state."""
    latencies: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.purpose == Purpose.CROSS_CHECK and sample.verified and sample.ttft_ms is not None:
            latencies[sample.state][sample.isolation].append(sample.ttft_ms)
    found: list[dict[str, Any]] = []
    for state, by_isolation in latencies.items():
        fork, strict = by_isolation[Isolation.FORK], by_isolation[Isolation.STRICT]
        ratio = unpaired_ratio(fork, strict)
        if ratio is not None:
            found.append(
                {
                    "state": state,
                    "fork_ttft_ms": _json(estimate(fork)),
                    "strict_ttft_ms": _json(estimate(strict)),
                    **asdict(ratio),
                    "tolerance": CROSS_CHECK_TOLERANCE,
                    "verdict": verdict(ratio, CROSS_CHECK_TOLERANCE),
                }
            )
    return found


def _json(value: Estimate | Ratio | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
