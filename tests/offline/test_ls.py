"""`warmkv store ls`, beside a running store and without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kv.driver import FINGERPRINT, OTHER_MODEL, TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import refusal, run, run_json, tree
from warmkv_server.contract.names import hidden_id


async def test_it_tells_what_agents_there_are_and_what_they_take(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    driver = await Driver.open(tmp_path, LAYOUTS["everything"])
    await driver.put("a", context(1000))
    await driver.put("b", context(700, [3] * 100), pinned=True, ttl=60.0)
    records = {record.agent_id: record for record in driver.store.agents(TENANT)}
    beside = run_json("store", "ls", "--data-dir", tmp_path)
    await driver.close()
    driver = await Driver.open(tmp_path, LAYOUTS["everything"], OTHER_MODEL)
    await driver.put("c", context(300))
    await driver.put("", context([8] * 500), kept_as=hidden_id(), ttl=3600.0)
    await driver.close()

    before = tree(tmp_path)
    found = run_json("store", "ls", "--data-dir", tmp_path)
    assert tree(tmp_path) == before
    assert found["agents"][:2] == beside["agents"]
    for line in beside["agents"]:
        record = records[line["agent_id"]]
        assert (line["tenant"], line["tokens"], line["usable_tokens"]) == (
            TENANT,
            record.token_count,
            record.token_count,
        )
        assert (line["disk_bytes"], line["shared_bytes"]) == (record.warm_bytes, record.shared_bytes)
        assert (line["pinned"], line["ttl"], line["revision"]) == (record.pinned, record.ttl, 1)
        assert line["fingerprint"] == FINGERPRINT.digest
    models = {model["fingerprint"]: model for model in found["models"]}
    assert models[OTHER_MODEL.digest]["fields"] == OTHER_MODEL.fields
    assert [models[f.digest]["agents"] for f in (FINGERPRINT, OTHER_MODEL)] == [2, 1]
    assert sum(model["disk_bytes"] for model in models.values()) == found["block_bytes"]
    sizes = [len(content) for name, content in before.items() if name.startswith("blocks")]
    assert (found["block_files"], found["block_bytes"]) == (len(sizes), sum(sizes))

    said = run("store", "ls", "--data-dir", tmp_path).stdout
    assert FINGERPRINT.digest[:12] in said
    assert "3 agents" in said
    assert (len(found["agents"]), found["hidden_agents"]) == (3, 1)
    assert 0 < found["hidden_bytes"] < found["block_bytes"]
    assert "1 contexts of requests without an agent" in said
    archives = tmp_path_factory.mktemp("archives")
    run("agents", "export", "--all", "--output", archives, "--data-dir", tmp_path)
    assert {path.name for path in archives.rglob("*.warmkv")} == {"a.warmkv", "b.warmkv", "c.warmkv"}


def test_another_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a data directory" in refusal("store", "ls", "--data-dir", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
