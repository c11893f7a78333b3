"""Answers in every format, cut anywhere, ten thousand times."""

from __future__ import annotations

import pytest

from tests.engine.answers import ANSWERS, any_cut_gives_the_same_events

CUTS = 10_000


@pytest.mark.parametrize("form", ANSWERS)
def test_any_of_ten_thousand_cuts_gives_the_same_events(form: str) -> None:
    any_cut_gives_the_same_events(form, CUTS)
