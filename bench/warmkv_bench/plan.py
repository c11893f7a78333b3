"""The order of a run: rounds of one repetition each, in which the states are interleaved."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from warmkv_bench.config import Isolation, MatrixConfig, Mode, State

CROSS_CHECK_RUNS = 15
CROSS_CHECK_STATES = (State.WARM, State.HOT)
PAIR = 2


class Purpose(StrEnum):
    """Why a round is in the plan; CALIBRATION is warm-up and first prediction, and reported nowhere."""

    CALIBRATION = "calibration"
    MATRIX = "matrix"
    CONCURRENT = "concurrent"
    CROSS_CHECK = "cross-check"


@dataclass(frozen=True, slots=True)
class Round:
    """One repetition at one size: `batch_size` prefixes, each measured in `states`, in that order and as often."""

    context_tokens: int
    mode: Mode
    batch_size: int
    run: int
    states: tuple[State, ...]
    isolation: Isolation
    purpose: Purpose = Purpose.MATRIX

    @property
    def key(self) -> str:
        """Names the round within its plan; part of the ids of its agents."""
        return f"{self.purpose}.{self.isolation}.c{self.context_tokens}.{self.mode}.b{self.batch_size}.r{self.run}"


def plan(config: MatrixConfig) -> list[Round]:
    """All rounds, small contexts first.

    Within a context the repetitions come one after another and hold every mode and batch size, so that a machine that
    slows down or warms up slows all of them alike. A concurrent pair is two cold prefills released together; where the
    batch sizes measure that already, it is not measured twice.
    """
    rounds: list[Round] = []
    smallest = min(config.contexts)
    for context in sorted(config.contexts):
        for run in range(1, config.runs + 1):
            for mode in config.modes:
                rounds += [_round(config, context, mode, batch, run) for batch in config.batch_sizes]
                if config.concurrency and not _measures_pairs(config):
                    pair = Round(context, mode, PAIR, run, (State.COLD,), config.isolation, Purpose.CONCURRENT)
                    rounds.append(pair)
        if config.cross_check and context == smallest:
            rounds += _cross_check(config, smallest)
    return rounds


def calibration(config: MatrixConfig) -> list[Round]:
    """Unmeasured rounds that warm the server up and give the first prediction.

    Two sizes are the least that a quadratic can be fitted to. The larger is a quarter of the largest context, which
    costs little beside it and leaves a factor of 4 to extrapolate over.
    """
    largest = max(config.contexts)
    sizes = sorted({max(1, min(512, largest), largest // 16), max(1, largest // 4)})
    states = tuple(state for state in State if state in config.states)
    return [Round(size, Mode.STREAMING, 1, 1, states, config.isolation, Purpose.CALIBRATION) for size in sizes]


def _round(config: MatrixConfig, context: int, mode: Mode, batch: int, run: int) -> Round:
    shuffler = random.Random(f"{config.seed}/{context}/{mode}/{batch}/{run}")
    states = _ordered(config.states, config.repeats, config.isolation, shuffler)
    return Round(context, mode, batch, run, states, config.isolation)


def _ordered(
    states: tuple[State, ...], repeats: int, isolation: Isolation, shuffler: random.Random
) -> tuple[State, ...]:
    """Shuffled, but first a cold sample that pays for the prime, and last a restart, which changes the server.

    Cold and restart are measured once; the others as often as they are to be repeated, shuffled anew each time.
    """
    first = [state for state in states if state == State.COLD and isolation == Isolation.FORK]
    last = [state for state in states if state == State.RESTART]
    between = [state for state in states if state not in first + last]
    order: list[State] = [*first]
    for repeat in range(repeats):
        again = [state for state in between if repeat == 0 or state != State.COLD]
        shuffler.shuffle(again)
        order += again
    return (*order, *last)


def _measures_pairs(config: MatrixConfig) -> bool:
    return PAIR in config.batch_sizes and State.COLD in config.states


def _cross_check(config: MatrixConfig, context: int) -> list[Round]:
    rounds: list[Round] = []
    for run in range(1, CROSS_CHECK_RUNS + 1):
        shuffler = random.Random(f"{config.seed}/cross-check/{run}")
        kinds = list(Isolation)
        shuffler.shuffle(kinds)
        for isolation in kinds:
            states = _ordered(CROSS_CHECK_STATES, 1, isolation, shuffler)
            rounds.append(Round(context, Mode.STREAMING, 1, run, states, isolation, Purpose.CROSS_CHECK))
    return rounds
