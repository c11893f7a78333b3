"""What a run of the matrix measures: its axes, and the choices that hold for all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where the KV of the measured request's prefix is when the request arrives."""

    COLD = "cold"
    WARM = "warm"
    WARM_DROPPED = "warm-dropped"
    HOT = "hot"
    RESTART = "restart"


class Mode(StrEnum):
    """How the answer comes back."""

    STREAMING = "streaming"
    FINAL = "final"


class Isolation(StrEnum):
    """What a sample shares with the others of its repetition.

    FORK: all of them are forks of one primed agent. STRICT: each has an agent of its own, primed from nothing.
    """

    FORK = "fork"
    STRICT = "strict"


class ConfigError(Exception):
    """A wrong option: one sentence that names it and says what it must be."""


@dataclass(frozen=True, slots=True)
class MatrixConfig:
    """The matrix. Contexts, suffix and output are in tokens, times in seconds.

    `context` is the length of the prefix whose KV is cold, warm or hot; the measured request adds `suffix_tokens` to
    it. Where the model's limit leaves no room for suffix and answer, the prefix is shortened by what is missing.
    `repeats` are samples of each warm or hot state in one run: with forks they cost little, a cold one costs a prefill.

    Raises:
        ConfigError: an axis is empty or holds a value that cannot be measured.
    """

    contexts: tuple[int, ...]
    states: tuple[State, ...] = (State.COLD, State.WARM, State.HOT)
    modes: tuple[Mode, ...] = (Mode.STREAMING, Mode.FINAL)
    runs: int = 3
    repeats: int = 1
    batch_sizes: tuple[int, ...] = (1,)
    concurrency: bool = False
    output_tokens: int = 64
    suffix_tokens: int = 32
    isolation: Isolation = Isolation.FORK
    cross_check: bool = False
    seed: int = 0
    max_time_s: float | None = None
    request_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for option, values in (
            ("--contexts", self.contexts),
            ("--states", self.states),
            ("--modes", self.modes),
            ("--batch-sizes", self.batch_sizes),
        ):
            if not values:
                raise ConfigError(f"{option} is empty: name at least one")
            if len(set(values)) != len(values):
                raise ConfigError(f"{option} names a value twice: {', '.join(map(str, values))}")
        for option, value, least in (
            ("--contexts", min(self.contexts), 1),
            ("--batch-sizes", min(self.batch_sizes), 1),
            ("--runs", self.runs, 1),
            ("--repeats", self.repeats, 1),
            ("--output-tokens", self.output_tokens, 2),
            ("--suffix-tokens", self.suffix_tokens, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{option} is {value}: it must be at least {least}")
        if self.max_time_s is not None and self.max_time_s <= 0:
            raise ConfigError(f"--max-time is {self.max_time_s:g}: it must be above 0 seconds")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MatrixConfig:
        return cls(
            **{
                **data,
                "contexts": tuple(data["contexts"]),
                "states": tuple(State(state) for state in data["states"]),
                "modes": tuple(Mode(mode) for mode in data["modes"]),
                "batch_sizes": tuple(data["batch_sizes"]),
                "isolation": Isolation(data["isolation"]),
            }
        )


def prefix_tokens(context: int, config: MatrixConfig, context_limit: int) -> int:
    """The exact length of the prefix that is measured as `context`, in tokens.

    Raises:
        ConfigError: the model's limit does not hold the context.
    """
    room = context_limit - config.suffix_tokens - config.output_tokens
    if context > context_limit or room < 1:
        raise ConfigError(
            f"--contexts has {context}, but the model's limit is {context_limit} tokens: leave it out, or serve a "
            "model with a longer context"
        )
    return min(context, room)
