"""`--whole`: every prompt and every turn, which takes an hour; without it, a share that CI has time for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.reference import sources

Found = TypeVar("Found")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="all prompts, of up to 4,000 tokens")


def fetched(fetch: Callable[[], Found]) -> Found:
    """What is fetched; the test is left out where no index can be reached."""
    try:
        return fetch()
    except sources.Unreachable as error:
        pytest.skip(f"left out, since what it is tried on can't be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return fetched(sources.smollm2)
