"""Named choices for every axis of the matrix; an option of the command line overrides its part of one."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from warmkv_bench.config import Isolation, Mode, State

ALL_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
AUDITED_STATES = (State.COLD, State.WARM, State.HOT)


class Preset(StrEnum):
    QUICK = "quick"
    SEED = "seed"
    FULL = "full"
    CI = "ci"


# Arguments of MatrixConfig.
PRESETS: dict[Preset, dict[str, Any]] = {
    # One run, streaming only: the results of each size for the time of one cold prefill.
    Preset.QUICK: {
        "contexts": (1024, 4096, 8192),
        "states": AUDITED_STATES,
        "modes": (Mode.STREAMING,),
        "runs": 1,
        "repeats": 5,
    },
    # The matrix of the audit that this benchmark began with: at each context 3 states x 2 modes x 3 runs = 18
    # scenarios, a concurrent pair of cold prefills, and pairs in every state; every warm and hot run primed anew.
    Preset.SEED: {
        "contexts": ALL_CONTEXTS,
        "states": AUDITED_STATES,
        "modes": (Mode.STREAMING, Mode.FINAL),
        "runs": 3,
        "batch_sizes": (1, 2),
        "concurrency": True,
        "isolation": Isolation.STRICT,
    },
    # Every state, with enough runs for confidence intervals.
    Preset.FULL: {
        "contexts": ALL_CONTEXTS,
        "states": tuple(State),
        "modes": (Mode.STREAMING, Mode.FINAL),
        "runs": 5,
        "batch_sizes": (1, 2, 4),
        "concurrency": True,
        "cross_check": True,
    },
    # Small enough for every change, with enough runs to tell a regression from noise.
    Preset.CI: {
        "contexts": (512, 2048),
        "states": (State.COLD, State.WARM, State.HOT),
        "modes": (Mode.STREAMING,),
        "runs": 5,
        "output_tokens": 16,
        "cross_check": True,
    },
}
