"""`warmkv store rebuild-index`, and what the other commands leave for it."""

from __future__ import annotations

from pathlib import Path

from tests.kv.driver import TENANT, Driver
from tests.kv.test_rebuild import lose_index, manifest_of, ruin_index
from tests.kv.words import context
from tests.offline.commands import refusal, run, run_json


async def test_it_builds_the_index_anew_and_keeps_the_old_one(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(500), labels={"k": "v"})
    await driver.put("b", context(500, [1] * 100))
    await driver.close()
    before = run_json("store", "ls", "--data-dir", tmp_path)["agents"]
    for lose in (lambda _: None, ruin_index, lose_index):
        lose(tmp_path)
        result = run("store", "rebuild-index", "--data-dir", tmp_path)
        assert result.exit_code == 0, result.output
        assert "2 agents with 1100 tokens came back" in result.stdout
        found = run_json("store", "ls", "--data-dir", tmp_path)["agents"]
        assert [{**agent, "last_used": 0} for agent in found] == [{**agent, "last_used": 0} for agent in before]
        assert bool(kept_aside(tmp_path)) == (lose is not lose_index)
    driver = await Driver.open(tmp_path)
    assert (await driver.reuse("b", context(500, [1] * 100))).length == 600
    await driver.close()


def kept_aside(data_dir: Path) -> list[Path]:
    return list(data_dir.glob("index.sqlite.replaced-*"))


async def test_it_refuses_where_it_can_only_do_harm(tmp_path: Path) -> None:
    assert "not a data directory" in refusal("store", "rebuild-index", "--data-dir", tmp_path)
    assert not (tmp_path / "lock").exists()
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(300))
    await driver.store.settled()
    assert "in use by process" in refusal("store", "rebuild-index", "--data-dir", tmp_path)
    await driver.close()
    manifest_of(tmp_path, "a").unlink()
    (tmp_path / "commits.log").unlink()
    assert "no readable manifest" in refusal("store", "rebuild-index", "--data-dir", tmp_path)
    driver = await Driver.open(tmp_path)
    assert (await driver.reuse("a", context(300))).length == 300
    await driver.close()
    lose_index(tmp_path)
    assert "rebuild-index" in refusal("store", "ls", "--data-dir", tmp_path)


async def test_an_agent_that_did_not_come_back_is_named(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(100))
    await driver.put("b", context([5] * 100))
    await driver.close()
    next((tmp_path / "blocks").glob("*/*")).unlink()
    result = run("store", "rebuild-index", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert "1 agents with 100 tokens came back" in result.stdout
    assert "1 agents did not: '" in result.stdout


async def test_what_gc_deletes_does_not_come_back(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(300))
    await driver.put("pinned", context(300), pinned=True)
    await driver.close()
    result = run("store", "gc", "--data-dir", tmp_path, "--agents-unused-for", "0s")
    assert result.exit_code == 0, result.output
    assert not manifest_of(tmp_path, "a").exists()
    lose_index(tmp_path)
    driver = await Driver.open(tmp_path)
    assert [agent.agent_id for agent in driver.store.agents(TENANT)] == ["pinned"]
    await driver.close()


async def test_an_imported_agent_has_a_manifest(tmp_path: Path) -> None:
    data, archive = tmp_path / "data", tmp_path / "a.warmkv"
    driver = await Driver.open(data)
    await driver.put("a", context(300))
    await driver.close()
    for arguments in (("export", "a", "-o", archive), ("import", archive, "--as", "b")):
        result = run("agents", *arguments, "--data-dir", data, "--tenant", TENANT)
        assert result.exit_code == 0, result.output
    lose_index(data)
    driver = await Driver.open(data)
    assert (await driver.reuse("b", context(300))).length == 300
    assert driver.store.agent(TENANT, "b") is not None
    await driver.close()
