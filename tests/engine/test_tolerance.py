"""How near a context of which a part was decoded is to the same context computed at once, for each number of KV bits.

Decoding computes a row at a time where a prefill computes many, and sums round differently: in 32 bits by about one
part in a million. Unquantised KV differs by as much. Quantised KV is equal word for word, but for the few values that
rounding takes across the edge between two words; such a value is off by a whole step, a fifteenth of its group's range
with 4 bits and a 255th with 8. What that does to the next token's distribution depends on what attends to the value, so
it is bounded as a distribution: docs/quality.md states these bounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.tolerance import CASES

ROOT = Path(__file__).parents[2]
NEAR = 0.01
"""A difference of log-probabilities; a hundredth changes a probability by one percent of itself."""


@dataclass(frozen=True)
class Bound:
    """
    Attributes:
        near: so many of the cases at least are within NEAR.
        most: no case differs by more.
        words: so large a share of the stored words at least is equal, in every case.
    """

    near: int
    most: float
    words: float


BOUNDS = {0: Bound(CASES, 1e-3, 0.0), 8: Bound(6, 1.0, 0.95), 4: Bound(17, 1.0, 0.98)}
"""Unquantised, rounding alone. With 8 bits there are 17 times as many edges as with 4, so more cases have a value that
crosses one, and each moves less; at most as much as was ever seen with 4 bits, 0.82."""


@pytest.mark.parametrize("bits", BOUNDS)
def test_a_decoded_context_is_near_to_one_that_was_computed_at_once(bits: int) -> None:
    command = [sys.executable, "-m", "tests.engine.tolerance", str(bits)]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    differences, shares = found["differences"], found["shares"]
    assert len(differences) == CASES
    bound = BOUNDS[bits]
    assert sum(each <= NEAR for each in differences) >= bound.near, differences
    assert max(differences) <= bound.most, differences
    assert min(shares, default=1.0) >= bound.words, shares
