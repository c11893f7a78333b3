"""One server for all tests that leave it as it was; each of them has agents of its own."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator

import pytest

from tests.e2e.harness import Client, Server, serving


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    with serving(tmp_path_factory.mktemp("shared") / "data") as pair:
        yield pair


@pytest.fixture
def server(shared: tuple[Server, Client]) -> Server:
    return shared[0]


@pytest.fixture
def client(shared: tuple[Server, Client]) -> Client:
    return shared[1]


@pytest.fixture
def agent() -> str:
    """An agent_id that no other test has."""
    return f"agent-{uuid.uuid4().hex}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """For token sequences that no other test has, so that nothing is shared by chance; the same in every run."""
    return zlib.crc32(request.node.nodeid.encode())
