"""`warmkv store gc`: removes what nothing needs and what is named, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kv.driver import FINGERPRINT, OTHER_MODEL, TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import refusal, run, run_json, tree
from warmkv_server.contract.names import AgentKey
from warmkv_server.offline.directory import look, take
from warmkv_server.offline.verify import verify

LAYOUT = LAYOUTS["everything"]


@pytest.fixture
async def data_dir(tmp_path: Path) -> Path:
    """a and b share two blocks, c is pinned, x is of another model. Leftovers of a crash, and a bad file."""
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("a", context(512, [1] * 300))
    await driver.put("b", context(512, [2] * 300))
    await driver.put("c", context([3] * 300), pinned=True)
    await driver.close()
    driver = await Driver.open(tmp_path, LAYOUT, OTHER_MODEL)
    await driver.put("x", context(512))
    await driver.close()
    (tmp_path / "blocks" / "00" / f"{'0' * 32}.append.{'0' * 32}.safetensors.3.tmp").write_bytes(b"half")
    (tmp_path / "blocks" / "00" / f"{'0' * 32}.append.{'0' * 32}.safetensors").write_bytes(b"nobody was promised this")
    (tmp_path / "quarantine" / "bad.safetensors").write_bytes(b"bad")
    return tmp_path


def last_used(data_dir: Path, agent: str, seconds_ago: float) -> None:
    with take(data_dir) as taken:
        found = taken.index.agents[AgentKey(TENANT, agent)]
        statement = "UPDATE agents SET last_used = last_used - ? WHERE incarnation = ?"
        taken.database.apply([(statement, (seconds_ago, found.incarnation))])


def agents(data_dir: Path) -> list[str]:
    return sorted(agent_id for _, agent_id in look(data_dir).index.agents)


def test_leftovers_go_and_nothing_else(data_dir: Path) -> None:
    before = tree(data_dir)
    told = run_json("store", "gc", "--data-dir", data_dir, "--dry-run")
    assert tree(data_dir) == before
    done = run_json("store", "gc", "--data-dir", data_dir)
    assert {**told, "dry_run": False} == done
    after = tree(data_dir)
    gone = before.keys() - after.keys()
    assert {Path(path).suffix for path in gone} == {".tmp", ".safetensors"}
    assert len(gone) == 2
    assert done["bytes"] == sum(len(before[path]) for path in gone)
    assert (agents(data_dir), done["agents"]) == (["a", "b", "c", "x"], [])
    assert run_json("store", "gc", "--data-dir", data_dir)["bytes"] == 0


def test_unused_agents_go_with_what_only_they_used(data_dir: Path) -> None:
    run("store", "gc", "--data-dir", data_dir)
    for agent in ("a", "c"):
        last_used(data_dir, agent, 3 * 86400)
    before = tree(data_dir)
    said = run("store", "gc", "--data-dir", data_dir, "--agents-unused-for", "2d").stdout
    assert "delete agent 'a' of tenant 't': 812 tokens, last used 3 d ago" in said
    assert "keep agent 'c' of tenant 't', which is pinned" in said
    assert agents(data_dir) == ["b", "c", "x"]
    gone = before.keys() - tree(data_dir).keys()
    assert gone
    index = look(data_dir).index
    assert all(node.refs for node in index.nodes.values())
    assert verify(lambda: look(data_dir)).problems == []
    run("store", "gc", "--data-dir", data_dir, "--agents-unused-for", "2d", "--pinned-too")
    assert agents(data_dir) == ["b", "x"]


async def test_another_models_agents_go_only_when_it_is_named(data_dir: Path) -> None:
    done = run_json("store", "gc", "--data-dir", data_dir, "--fingerprint", OTHER_MODEL.digest[:6])
    assert done["agents"] == [{"tenant": TENANT, "agent_id": "x"}]
    assert look(data_dir).fingerprints.keys() == {FINGERPRINT.digest}
    assert all(node.fingerprint == FINGERPRINT.digest for node in look(data_dir).index.nodes.values())
    driver = await Driver.open(data_dir, LAYOUT)
    for agent, tokens in (("a", context(512, [1] * 300)), ("b", context(512, [2] * 300)), ("c", context([3] * 300))):
        assert (await driver.reuse(agent, tokens)).length == len(tokens)
    await driver.close()


def test_both_conditions_narrow_each_other(data_dir: Path) -> None:
    options = ("--fingerprint", FINGERPRINT.digest, "--agents-unused-for", "1h", "--pinned-too")
    last_used(data_dir, "b", 7200)
    last_used(data_dir, "x", 7200)
    assert [each["agent_id"] for each in run_json("store", "gc", "--data-dir", data_dir, *options)["agents"]] == ["b"]


def test_the_quarantine_is_emptied_when_asked(data_dir: Path) -> None:
    assert "files in quarantine: 1 with 3 B" in run("store", "gc", "--data-dir", data_dir, "--quarantine").stdout
    assert list((data_dir / "quarantine").iterdir()) == []


async def test_what_cannot_be_is_refused(data_dir: Path) -> None:
    assert "no fingerprint begins with 'ffff'" in refusal(
        "store", "gc", "--data-dir", data_dir, "--fingerprint", "ffff"
    )
    assert "is no duration" in refusal("store", "gc", "--data-dir", data_dir, "--agents-unused-for", "soon")
    driver = await Driver.open(data_dir, LAYOUT)
    assert "in use by process" in refusal("store", "gc", "--data-dir", data_dir)
    await driver.close()
