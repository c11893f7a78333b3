"""Plain mlx-lm on the same random shape: time to first token and decode speed, alone and eight at once.

Run it on the machine that ran the benchmark, with the server's packages installed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step

from warmkv_server.engine.model import random_model

TOKENS = 48


def alone(model: Any, prompt: mx.array) -> tuple[float, float]:
    """Seconds to the first token, and the median of those between two."""
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in generate_step(prompt, model, max_tokens=TOKENS)]
    gaps = [after - before for before, after in itertools.pairwise(times[1:])]
    return times[1] - times[0], statistics.median(gaps)


def together(model: Any, prompts: list[list[int]], prefilled: int) -> tuple[float, float]:
    """Median seconds of a step while all decode, if they ever do, and tokens a second of all, request to last token.

    Args:
        prefilled: prompts that are prefilled together, at most.
    """
    generator = BatchGenerator(model, max_tokens=TOKENS, prefill_batch_size=prefilled)
    began = time.perf_counter()
    generator.insert(prompts)
    steps: list[float] = []
    done = tokens = 0
    while done < len(prompts):
        before = time.perf_counter()
        _, responses = generator.next()
        if len(responses) == len(prompts):
            steps.append(time.perf_counter() - before)
        tokens += len(responses)
        done += sum(response.finish_reason is not None for response in responses)
    return statistics.median(steps) if steps else math.nan, tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--rows-up-to", type=int, default=16384, help="largest context for eight at once")
    parser.add_argument("--prefilled", type=int, default=8, help="of the eight, prompts that are prefilled together")
    parser.add_argument("--runs-of-eight", type=int, default=2)
    options = parser.parse_args()
    model, config = random_model.build(options.shape)
    mx.random.seed(1)
    for context in options.contexts:
        prompts = mx.random.randint(1, config["vocab_size"], (9, context))
        for run in (1, 2):  # the first compiles kernels and attention plans for these shapes
            first, gap = alone(model, prompts[0])
            print(
                f"{context:6} alone, run {run}: first token {1e3 * first:7.1f} ms, then one every {1e3 * gap:6.2f} ms",
                flush=True,
            )
        if context <= options.rows_up_to:
            for run in range(1, options.runs_of_eight + 1):
                step, rate = together(model, cast(list[list[int]], prompts[1:].tolist()), options.prefilled)
                print(
                    f"{context:6} eight, run {run}: a step every {1e3 * step:6.2f} ms, {rate:6.1f} tokens/s in all",
                    flush=True,
                )
        mx.clear_cache()


if __name__ == "__main__":
    main()
