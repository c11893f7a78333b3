"""What a request has gone through, for whoever wants to see where its time went."""

from __future__ import annotations

import time
from enum import StrEnum


class Stage(StrEnum):
    QUEUE = "queue"
    LOAD = "load"
    PREFILL = "prefill"
    DECODE = "decode"
    COMMIT = "commit"


class Stages:
    """The way of one request. It is in one stage at a time, or in none.

    Attributes:
        arrived: when it came in, on `time.perf_counter`, as all times here.
        entered: the stages in order, and when each was entered; None where one ended and none began.
    """

    def __init__(self) -> None:
        self.arrived = time.perf_counter()
        self.entered: list[tuple[Stage | None, float]] = []

    def enter(self, stage: Stage | None) -> None:
        """Leave the stage that it is in, and go into this one, unless that is the same."""
        if not self.entered or self.entered[-1][0] is not stage:
            self.entered.append((stage, time.perf_counter()))
