"""What `make gateway-test` installs beside the server's own environment, and a gateway that most tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

_PACKAGES = next(iter(Path(".gateway/venv/lib").glob("python*/site-packages")), None)
if _PACKAGES is None:
    raise pytest.UsageError("these tests need a gateway and clients: run them with `make gateway-test`")
sys.path.append(str(_PACKAGES.resolve()))  # last: what the server needs comes from its own environment

if TYPE_CHECKING:
    from tests.gateway.harness import Gateway, Worker


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Worker]]:
    """With one server that keeps what clients without an identity say."""
    from tests.gateway.harness import running

    with running(tmp_path_factory.mktemp("gateway"), "--keep-anonymous", "1h") as (front, (worker,)):
        yield front, worker


@pytest.fixture
def front(shared: tuple[Gateway, Worker]) -> Gateway:
    return shared[0]


@pytest.fixture
def worker(shared: tuple[Gateway, Worker]) -> Worker:
    return shared[1]
