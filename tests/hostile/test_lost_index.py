"""Every acknowledged context survives what happens to the index: a bit of its log, its files, an older copy of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.harness import Client, Server, serving, some_tokens, token_ids

AGENTS = 12


def index_files(data_dir: Path) -> list[Path]:
    return list(data_dir.glob("index.sqlite*"))


def flip_in_mid_log(data_dir: Path) -> None:
    path = data_dir / "index.sqlite-wal"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_the_log(data_dir: Path) -> None:
    path = data_dir / "index.sqlite-wal"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def remove_the_log(data_dir: Path) -> None:
    (data_dir / "index.sqlite-wal").unlink()


def remove_all(data_dir: Path) -> None:
    for path in index_files(data_dir):
        path.unlink()


def ruin_the_file(data_dir: Path) -> None:
    """With its log, whose first page would stand in for the file's."""
    remove_the_log(data_dir)
    path = data_dir / "index.sqlite"
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])


class Older:
    """Puts back a copy that was taken earlier, over the log of now or instead of it."""

    def __init__(self, *, log_too: bool) -> None:
        self.log_too = log_too

    def keep(self, data_dir: Path) -> None:
        shutil.copytree(data_dir, data_dir.with_name("older"))

    def __call__(self, data_dir: Path) -> None:
        if self.log_too:
            remove_all(data_dir)
        for path in index_files(data_dir.with_name("older")):
            if self.log_too or path.name == "index.sqlite":
                shutil.copy(path, data_dir / path.name)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of the log": flip_in_mid_log,
    "half of the log": cut_the_log,
    "the log": remove_the_log,
    "all of it": remove_all,
    "file and log": ruin_the_file,
    "an older copy": Older(log_too=True),
}


def contexts_of(client: Client) -> dict[str, tuple[int, int, str]]:
    found = {}
    for agent in client.list(page_size=1000).agents:
        found[agent.agent_id] = (agent.revision, agent.token_count, agent.labels["k"])
    return found


def blocks(data_dir: Path) -> set[str]:
    return {path.name for path in data_dir.glob("blocks/*/*.safetensors")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_acknowledged_is_lost(tmp_path: Path, damage: str) -> None:
    data_dir = tmp_path / "data"
    harm = DAMAGES[damage]
    with serving(data_dir) as (server, client):
        client.prime("deleted", token_ids(some_tokens(300, seed=99)))
        for number in range(AGENTS):
            client.prime(f"a{number}", token_ids(some_tokens(280, seed=number)), labels={"k": "1"})
        if isinstance(harm, Older):
            harm.keep(data_dir)
        client.delete("deleted")
        with ThreadPoolExecutor(6) as at_once:
            list(at_once.map(lambda n: _go_on(client, n), range(AGENTS)))
        expected = contexts_of(client)
        server.kill()
    kept = blocks(data_dir)
    harm(data_dir)
    with serving(data_dir) as (server, client):
        assert contexts_of(client) == expected
        assert kept <= blocks(data_dir)
        for number in range(AGENTS):
            answer = client.generate(f"a{number}", max_tokens=1)
            assert answer.cache.cached_tokens >= answer.cache.prompt_tokens - 1
        assert "was rebuilt" in server.log_text()
        assert "came back" in server.log_text()
        assert "Traceback" not in server.log_text()
        expected = contexts_of(client)
        server.kill()
    with serving(data_dir) as (server, client):
        assert contexts_of(client) == expected
        assert server.log_text().count("was rebuilt") == 1


def _go_on(client: Client, number: int) -> None:
    assert client.extend(f"a{number}", token_ids(some_tokens(20, seed=number + 50))).persisted
    if number % 3 == 0:
        agent = client.get(f"a{number}")
        agent.labels["k"] = "2"
        client.update(agent, "labels")


def test_index_files_that_go_under_a_live_server_cost_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir) as (server, client):
        client.prime("a", token_ids(some_tokens(300)))
        client.prime("deleted", token_ids(some_tokens(300, seed=1)))
        remove_all(data_dir)
        for number in range(5):
            assert client.extend("a", token_ids(some_tokens(20, seed=number))).persisted
        client.prime("b", token_ids(some_tokens(300, seed=2)))
        client.delete("deleted")
        expected = contexts_of(client)
        server.kill()
    with serving(data_dir) as (_, client):
        assert contexts_of(client) == expected
        assert expected["a"][1] == 400


def test_a_file_of_one_index_under_the_log_of_a_later_one_is_damage(tmp_path: Path) -> None:
    """SQLite joins them without a word."""
    data_dir, older = tmp_path / "data", Older(log_too=False)
    with serving(data_dir) as (server, client):
        client.prime("deleted", token_ids(some_tokens(300, seed=99)))
        client.prime("a", token_ids(some_tokens(300)))
        assert server.terminate() == 0
    older.keep(data_dir)
    with serving(data_dir) as (server, client):
        client.delete("deleted")
        assert server.terminate() == 0
    with serving(data_dir) as (server, client):
        client.extend("a", token_ids(some_tokens(20)))
        client.prime("b", token_ids(some_tokens(300, seed=1)))
        expected = contexts_of(client)
        server.kill()
    older(data_dir)
    with serving(data_dir) as (server, client):
        assert contexts_of(client) == expected
        assert "was rebuilt" in server.log_text()


def test_a_clean_crash_rebuilds_nothing_and_removes_what_was_never_committed(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir) as (server, client):
        client.prime("a", token_ids(some_tokens(300)))
        server.kill()
    stray = next(data_dir.glob("blocks/*/*.safetensors"))
    name = f"{stray.name[:2]}{'0' * 30}.append.{'0' * 32}.safetensors"
    shutil.copy(stray, stray.with_name(name))
    server = Server(data_dir)
    try:
        assert "rebuilt" not in server.log_text()
        assert name not in blocks(data_dir)
    finally:
        server.kill()
