"""Archives by people with bad intent: right checksums over anything."""

from __future__ import annotations

import dataclasses
import io
import math
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.kv.driver import TENANT, Driver
from tests.kv.test_rebuild import lose_index
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import refusal, run, tree, verify
from warmkv_server.contract.kv import Source
from warmkv_server.kv.catalog.sealed import seal, unseal

LAYOUT = LAYOUTS["everything"]
TOKENS = context(600, [4] * 30)


async def serve_once(data_dir: Path) -> None:
    await (await Driver.open(data_dir, LAYOUT)).close()


@pytest.fixture
async def archive(tmp_path: Path) -> Path:
    driver = await Driver.open(tmp_path / "from", LAYOUT)
    await driver.put("a", TOKENS, keep=[630])
    await driver.close()
    path = tmp_path / "a.warmkv"
    exported = run("agents", "export", "--data-dir", tmp_path / "from", "--tenant", TENANT, "a", "-o", path)
    assert exported.exit_code == 0, exported.output
    return path


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]


def write(path: Path, content: list[tuple[str, bytes]], pax: dict[str, str] | None = None) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT, pax_headers=pax) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_raw(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def sealed_text(rest: bytes) -> bytes:
    """A right checksum over what is no JSON."""
    head, end = b'{"xxh3_128":"', b'",' + rest
    digest = xxhash.xxh3_128(head + b"0" * 32 + end).hexdigest().encode()
    return head + digest + end


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, sealed as anybody can seal it."""
    (name, content), *rest = members(path)
    told = unseal(content)
    change(told)
    write(path, [(name, seal(told)), *rest])


FORGERIES: dict[str, dict[str, Any]] = {
    "far create_time": {"create_time": 1e300},
    "endless update_time": {"update_time": math.inf},
    "no time": {"update_time": math.nan},
    "negative time": {"create_time": -1.0},
    "time as text": {"create_time": "1"},
    "far ttl": {"ttl": 1e300},
    "no ttl": {"ttl": math.nan},
    "negative ttl": {"ttl": -1.0},
    "large revision": {"revision": 2**63},
    "revision 0": {"revision": 0},
    "broken revision": {"revision": 1.5},
    "numeric tenant": {"tenant": 7},
    "half a character": {"tenant": "\ud800"},
    "half a character in a label": {"labels": {"k": "\udfff"}},
    "half a character in the ending": {"ending": "\udfff"},
    "long label": {"labels": {"k": "x" * 256}},
    "many labels": {"labels": {str(number): "" for number in range(65)}},
    "labels that are none": {"labels": [1, 2]},
    "agent_id": {"agent_id": "../x"},
    "agent_id list": {"agent_id": ["x"]},
    "parent": {"parent_agent_id": "a b"},
    "pin": {"pinned": "yes"},
    "kept": {"kept": [10**6]},
    "previous": {"previous": -1},
    "nodes": {"nodes": 5},
    "node": {"nodes": [{}]},
    "root": {"root": "00"},
    "fingerprint": {"fingerprint": {"weights": 1}},
    "a list": {"fingerprint": []},
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_what_the_api_would_refuse_is_refused(archive: Path, tmp_path: Path, name: str) -> None:
    to = tmp_path / "to"
    await serve_once(to)
    forge(archive, lambda told: told.update(FORGERIES[name]))
    before = tree(to)
    for trust in ([], ["--trust"]):
        said = refusal("agents", "import", "--data-dir", to, archive, *trust)
        assert "can't be imported" in said
        assert tree(to) == before


async def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path / "from", LAYOUT)
    await driver.put("a", context(300, [10**9]))
    await driver.close()
    path = tmp_path / "a.warmkv"
    assert run("agents", "export", "--data-dir", tmp_path / "from", "--tenant", TENANT, "a", "-o", path).exit_code == 0
    small = dataclasses.replace(LAYOUT, vocabulary=4096)
    await (await Driver.open(tmp_path / "to", small)).close()
    assert "which the model doesn't have" in refusal("agents", "import", "--data-dir", tmp_path / "to", path)
    # And in the rows, the manifests and the blocks of a directory that has them already.
    driver = await Driver.open(tmp_path / "from", small)
    assert driver.store.agent(TENANT, "a") is None
    assert (await driver.reuse("x", context(300))).length == 0
    await driver.close()
    assert len(list((tmp_path / "from" / "quarantine").iterdir())) == 1
    assert list((tmp_path / "from" / "blocks").glob("*/*.safetensors"))
    driver = await Driver.open(tmp_path / "from", small)
    assert driver.store.agent(TENANT, "a") is None
    await driver.close()
    assert list((tmp_path / "from" / "blocks").glob("*/*.safetensors"))


async def test_kv_of_an_archive_is_its_own_agents_alone(archive: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    await serve_once(to)
    imported = run("agents", "import", "--data-dir", to, archive)
    assert "for this agent and its forks alone" in imported.stdout

    async def check(*agents: str) -> None:
        driver = await Driver.open(to, LAYOUT)
        for agent in agents:
            reuse = await driver.reuse(agent, driver.store.tokens(TENANT, agent))
            assert (reuse.length, reuse.fallback) == (len(driver.store.tokens(TENANT, agent)), None)
        assert (await driver.reuse("another", TOKENS)).length == 0
        assert (await driver.reuse("", TOKENS)).length == 0
        await driver.close()
        assert verify(to).problems == []

    await check("a")
    driver = await Driver.open(to, LAYOUT)
    await driver.store.fork(TENANT, "a", "fork")
    reuse, _ = await driver.put("fork", context(TOKENS.tolist(), [9] * 400))
    assert reuse.length == len(TOKENS)
    await driver.put("a", context(TOKENS.tolist(), [3] * 300), keep=[700])
    await driver.close()
    await check("a", "fork")
    lose_index(to)
    await check("a", "fork")
    await driver_deletes(to, "a")
    await check("fork")

    # Also elsewhere and back here, where the archive is signed, but not by whoever computed the KV.
    again = tmp_path / "fork.warmkv"
    exported = run("agents", "export", "--data-dir", to, "--tenant", TENANT, "fork", "-o", again)
    assert exported.exit_code == 0
    assert run("agents", "import", "--data-dir", to, again, "--as", "twin").exit_code == 0
    await check("fork", "twin")
    assert run("agents", "import", "--data-dir", tmp_path / "from", again, "--as", "twin").exit_code == 0
    driver = await Driver.open(tmp_path / "from", LAYOUT)
    assert (await driver.reuse("another", context(TOKENS.tolist(), [9] * 400))).length == len(TOKENS)
    await driver.close()

    # A new context of the agent is the server's own work.
    driver = await Driver.open(to, LAYOUT)
    await driver.put("fork", context([6] * 600))
    assert (await driver.reuse("another", context([6] * 600))).source is Source.SHARED
    await driver.close()


async def test_what_is_computed_behind_a_part_of_it_is_not_shared_either(tmp_path: Path) -> None:
    layout = LAYOUTS["append"]
    driver = await Driver.open(tmp_path / "from", layout)
    await driver.put("a", TOKENS)
    await driver.close()
    path = tmp_path / "a.warmkv"
    run("agents", "export", "--data-dir", tmp_path / "from", "--tenant", TENANT, "a", "-o", path)
    await (await Driver.open(tmp_path / "to", layout)).close()
    assert run("agents", "import", "--data-dir", tmp_path / "to", path).exit_code == 0
    driver = await Driver.open(tmp_path / "to", layout)
    for kept, length in ((300, 900), (100, 900), (100, 150)):
        tokens = context(TOKENS[:kept].tolist(), [kept + length] * (length - kept))
        reuse, _ = await driver.put("a", tokens)
        assert reuse.length == kept
        assert (await driver.reuse("another", tokens)).length == 0
    await driver.close()
    assert verify(tmp_path / "to").problems == []


async def driver_deletes(data_dir: Path, agent: str) -> None:
    driver = await Driver.open(data_dir, LAYOUT)
    await driver.store.delete(TENANT, agent)
    await driver.close()


async def test_an_archive_of_this_directory_is_trusted_and_a_changed_one_is_not(archive: Path, tmp_path: Path) -> None:
    source = tmp_path / "from"
    assert "alone" not in run("agents", "import", "--data-dir", source, archive, "--as", "b").stdout
    await driver_deletes(source, "a")
    await driver_deletes(source, "b")
    assert "alone" not in run("agents", "import", "--data-dir", source, archive).stdout
    forge(archive, lambda told: told["labels"].update(k="v"))
    assert "alone" in run("agents", "import", "--data-dir", source, archive, "--as", "c").stdout
    forge(archive, lambda told: [node.pop("sha256") for node in told["nodes"]])
    assert "alone" in run("agents", "import", "--data-dir", source, archive, "--as", "d").stdout
    forge(archive, lambda told: told.pop("hmac_sha256"))
    assert "alone" in run("agents", "import", "--data-dir", source, archive, "--as", "e").stdout
    assert verify(source).problems == []


async def test_another_imports_root_can_t_be_claimed(archive: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    await serve_once(to)
    assert run("agents", "import", "--data-dir", to, archive).exit_code == 0
    before = {path for path in tree(to) if path.startswith("blocks")}
    mine = tmp_path / "mine.warmkv"
    assert run("agents", "export", "--data-dir", to, "--tenant", TENANT, "a", "-o", mine).exit_code == 0
    forge(mine, lambda told: told.pop("hmac_sha256"))
    assert run("agents", "import", "--data-dir", to, mine, "--as", "b").exit_code == 0
    after = {path for path in tree(to) if path.startswith("blocks")}
    assert len(after) == 2 * len(before)


async def test_headers_and_sizes_are_bounded_before_they_are_read(archive: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    await serve_once(to)
    began = time.perf_counter()
    refusal("agents", "import", "--data-dir", to, tmp_path / "nothing")
    usual = time.perf_counter() - began
    content = members(archive)
    write(archive, content, {f"key{number}": "x" for number in range(20_000)})
    began = time.perf_counter()
    assert "can't be imported" in refusal("agents", "import", "--data-dir", to, archive)
    assert time.perf_counter() - began < 10 * usual + 10
    info = tarfile.TarInfo("manifest.json")
    info.size = 1 << 32
    write_raw(archive, info.tobuf(tarfile.USTAR_FORMAT))
    assert "are the most" in refusal("agents", "import", "--data-dir", to, archive)
    write(archive, [("manifest.json", sealed_text(b'"a":[' + b"[" * 100_000))])
    assert "can't be imported" in refusal("agents", "import", "--data-dir", to, archive)
    write(archive, [("manifest.json", seal({"nodes": [{}] * 10**6}))])
    assert "can't be imported" in refusal("agents", "import", "--data-dir", to, archive)
