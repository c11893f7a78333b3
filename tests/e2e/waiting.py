"""Waiting until a server has done something."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.e2e.harness import Client
from warmkv import v1

PATIENCE = 120.0
"""Seconds; longer than anything takes, unless it hangs."""


def await_that(condition: Callable[[], bool]) -> None:
    """For what the API tells only to those who ask."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it didn't happen"
        time.sleep(0.005)


def read_deltas(stream: Any, count: int) -> list[int]:
    """The tokens of the first deltas."""
    tokens: list[int] = []
    for event in stream:
        tokens += event.delta.token_ids
        if len(tokens) >= count:
            return tokens
    raise AssertionError("the stream ended early")


def found(client: Client, agent: str) -> list[v1.Agent]:
    """The agent, if it is there."""
    return [each for each in client.list(page_size=1000).agents if each.agent_id == agent]


def is_idle(client: Client, agent: str) -> bool:
    """Whether it is there, and nothing is done for it."""
    return any(each.activity == v1.ACTIVITY_IDLE for each in found(client, agent))
