"""Where long turns can be taken up again inside: few places, which a context that grows never wants back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from warmkv_server.contract.kv import STRIDES, inner_boundaries

LENGTHS = st.integers(1, 1 << 20)


@given(LENGTHS, LENGTHS)
def test_a_context_that_grows_wants_only_what_the_shorter_one_kept(one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    assert {b for b in inner_boundaries(longer) if b < shorter} <= inner_boundaries(shorter)


@given(LENGTHS, st.data())
def test_an_edit_costs_a_bounded_share_of_what_lies_behind_it(length: int, data: st.DataObject) -> None:
    boundaries = inner_boundaries(length)
    assert len(boundaries) <= 2 * len(STRIDES)
    assert all(0 < boundary < length for boundary in boundaries)
    behind = data.draw(st.integers(1, min(length, STRIDES[-1])))
    stride = next(stride for stride in STRIDES if stride >= behind)
    at = length - behind
    taken_up = max((boundary for boundary in boundaries if boundary <= at), default=0)
    assert length - taken_up <= 2 * stride
