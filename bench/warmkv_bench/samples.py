"""Turns an answer into a sample, and compares the answers of one repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from google.protobuf.duration_pb2 import Duration

from warmkv_bench.client import Answer
from warmkv_bench.config import Mode, State
from warmkv_bench.proof import source_name
from warmkv_bench.results import Sample

STAGES = ("queue", "load", "prefill", "first_token", "decode", "commit")


def filled(sample: Sample, answer: Answer, faults: Sequence[str]) -> Sample:
    """Writes what an answer measured and reports into a sample; it is verified if there are no faults.

    A final answer comes in one piece, so it has no time to first token and no gaps.
    """
    finished, report = answer.finished, answer.finished.cache
    tokens = len(answer.token_ids)
    sample.e2e_ms = round(answer.e2e_ms, 3)
    sample.output_tokens = tokens
    sample.output_ids = answer.token_ids
    sample.tokens_per_s = tokens / (answer.e2e_ms / 1e3)
    if answer.token_times_ms:
        sample.last_token_ms = round(answer.token_times_ms[-1], 3)
    if sample.mode == Mode.STREAMING and answer.first_delta_ms is not None:
        sample.ttft_ms = round(answer.first_delta_ms, 3)
        sample.token_times_ms = [round(time_ms, 3) for time_ms in answer.token_times_ms]
        gaps = [after - before for before, after in pairwise(answer.token_times_ms)]
        if gaps:
            sample.itl_ms = median(gaps)
            sample.tpot_ms = sum(gaps) / len(gaps)
    sample.source = source_name(report.source)
    sample.prompt_tokens = report.prompt_tokens
    sample.cached_tokens = report.cached_tokens
    sample.hot_tokens = report.hot_tokens
    sample.warm_tokens = report.warm_tokens
    sample.shared_tokens = report.shared_tokens
    sample.prefilled_tokens = report.prefilled_tokens
    sample.bytes_loaded = report.bytes_loaded
    sample.agent_hot_bytes = finished.agent.hot_bytes
    sample.agent_warm_bytes = finished.agent.warm_bytes
    sample.server = {stage: milliseconds(getattr(finished.timings, stage)) for stage in STAGES}
    return invalid(sample, "; ".join(faults)) if faults else _verified(sample)


def invalid(sample: Sample, reason: str) -> Sample:
    sample.verified = False
    sample.invalid_reason = reason
    return sample


def count_repeats(samples: Sequence[Sample]) -> None:
    """Numbers the samples of each state and place in the batch, in the order in which they were taken."""
    seen: Counter[tuple[str, int]] = Counter()
    for sample in samples:
        seen[sample.state, sample.batch_index] += 1
        sample.repeat = seen[sample.state, sample.batch_index]


def agree(samples: Sequence[Sample]) -> None:
    """Invalidates what broke the promise that one request on one context has one answer, hot, warm or restarted.

    Meant for requests that ran alone: in a batch the promise holds only where the best token is best by a margin.
    """
    restored = [sample for sample in samples if sample.verified and sample.state != State.COLD]
    hot = [sample for sample in restored if sample.state == State.HOT]
    for sample in restored:
        reference = (hot or restored)[0]
        if sample.output_ids != reference.output_ids:
            same = leading_agreement(sample.output_ids, reference.output_ids)
            invalid(sample, f"its answer leaves that of the {reference.state} sample after {same} tokens")


def leading_agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens up to the first one that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def milliseconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e6


def _verified(sample: Sample) -> Sample:
    sample.verified = True
    sample.invalid_reason = None
    return sample
