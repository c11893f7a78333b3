"""An index that is lost comes back from the manifests and the block files."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kv.disk import RefusingFiles
from tests.kv.driver import OTHER_MODEL, TENANT, Driver
from tests.kv.test_limits import disk_use
from tests.kv.words import LAYOUTS, context
from warmkv_server.contract.kv import Fallback, KVLayout
from warmkv_server.contract.store import AgentRecord, Durability
from warmkv_server.errors import OperatorError, StorageUnavailable
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog.manifest import BadManifest, decode, file_name

ENDLESS = 3600.0


def lose_index(data_dir: Path) -> None:
    for path in data_dir.glob("index.sqlite*"):
        path.unlink()


def lose_all_but_manifests(data_dir: Path) -> None:
    lose_index(data_dir)
    (data_dir / "commits.log").unlink()


def ruin_index(data_dir: Path) -> None:
    path = data_dir / "index.sqlite"
    path.write_bytes(b"x" * 4096 + path.read_bytes()[4096:])


def empty_index(data_dir: Path) -> None:
    (data_dir / "index.sqlite").write_bytes(b"")


def flip_a_token(data_dir: Path) -> None:
    """In a row that SQLite itself finds nothing wrong with."""
    path = data_dir / "index.sqlite"
    content = path.read_bytes()
    tokens = context(200).tobytes()
    assert tokens in content
    path.write_bytes(content.replace(tokens, context(199, [7]).tobytes()))


def manifest_of(data_dir: Path, agent_id: str) -> Path:
    return data_dir / "agents" / file_name(TENANT, agent_id)


def blocks_of(data_dir: Path, kind: str = "append") -> list[Path]:
    return sorted(data_dir.glob(f"blocks/*/*.{kind}.*.safetensors"))


def kept_aside(data_dir: Path) -> int:
    return len(list(data_dir.glob("index.sqlite.damaged-*")))


def but_for_restarts(record: AgentRecord) -> dict[str, object]:
    return {
        name: getattr(record, name)
        for name in AgentRecord.__dataclass_fields__
        if name not in ("incarnation", "tier", "hot_bytes", "last_used_time", "expire_time")
    }


@pytest.mark.parametrize("lose", [lose_index, ruin_index, empty_index])
@pytest.mark.parametrize("layout", ["append", "everything"])
async def test_everything_comes_back(
    tmp_path: Path, layout: str, lose: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    driver = await Driver.open(tmp_path, LAYOUTS[layout])
    await driver.put("a", context(700), keep=[699, 700], pinned=True, labels={"k": "v"}, ttl=1e6)
    await driver.put("a", context(700, [5] * 50), ending="here")
    await driver.store.fork(TENANT, "a", "b")
    await driver.put("b", context(700, [5] * 50, [6] * 600))
    await driver.store.update(TENANT, "b", labels={"other": "x"})
    await driver.put("c", context(300))
    await driver.put("deleted", context(400))
    await driver.store.delete(TENANT, "deleted")
    before = [but_for_restarts(record) for record in driver.store.agents(TENANT)]
    await driver.close()
    lose(tmp_path)
    with caplog.at_level(logging.WARNING):
        driver = await Driver.open(tmp_path, LAYOUTS[layout])
    (said,) = [record.getMessage() for record in caplog.records if "was rebuilt" in record.getMessage()]
    assert "3 agents with 2400 tokens came back" in said
    assert [but_for_restarts(record) for record in driver.store.agents(TENANT)] == before
    for agent in "abc":
        tokens = driver.store.tokens(TENANT, agent)
        assert (await driver.reuse(agent, tokens)).length == len(tokens)
    assert (await driver.reuse("a", context(700))).length == 700
    await driver.put("a", context(700, [5] * 50, [1] * 10))
    await driver.close()
    assert kept_aside(tmp_path) == (lose is not lose_index)
    driver = await Driver.open(tmp_path, LAYOUTS[layout])
    assert len(driver.store.tokens(TENANT, "a")) == 760
    await driver.close()


async def test_a_row_with_other_tokens_is_damage(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(200))
    await driver.close()
    flip_a_token(tmp_path)
    driver = await Driver.open(tmp_path)
    assert (await driver.reuse("a", context(200))).length == 200
    await driver.close()


async def test_a_missing_block_is_computed_anew_and_its_tokens_stay(tmp_path: Path) -> None:
    """Where the quota took blocks, the manifest has their tokens."""
    driver = await Driver.open(tmp_path, disk_bytes=3_000_000, hot_bytes=0)
    for number in range(24):
        await driver.put(str(number), context([number] * 1000))
    await driver.close()
    lose_index(tmp_path)
    driver = await Driver.open(tmp_path, disk_bytes=3_000_000)
    lengths = []
    for number in range(24):
        assert driver.store.tokens(TENANT, str(number)).tolist() == [number] * 1000
        lengths.append((await driver.reuse(str(number), context([number] * 1000))).length)
    assert (lengths[0], lengths[-1]) == (0, 1000)
    assert (await driver.reuse("0", context([0] * 1000))).fallback is Fallback.MISSING_BLOCK
    await driver.close()


@pytest.mark.parametrize("how", ["payload", "short"])
async def test_a_damaged_block_still_tells_its_tokens(tmp_path: Path, how: str) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(700))
    await driver.close()
    path = blocks_of(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if how == "payload" else content[:-1])
    lose_index(tmp_path)
    driver = await Driver.open(tmp_path)
    assert len(driver.store.tokens(TENANT, "a")) == 700
    reuse = await driver.reuse("a", context(700))
    assert reuse.length < 700
    await driver.put("a", context(700))
    await driver.close()
    assert (tmp_path / "quarantine" / path.name).exists()


async def test_segments_tell_the_tokens_of_those_before_them(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    for length in (300, 350, 400):
        await driver.put("a", context(length))
    await driver.close()
    shortest = min(blocks_of(tmp_path), key=lambda path: path.stat().st_size)
    lose_index(tmp_path)
    shortest.unlink()
    driver = await Driver.open(tmp_path)
    assert len(driver.store.tokens(TENANT, "a")) == 400
    await driver.close()


async def test_an_agent_whose_tokens_nobody_knows_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("broken", context(600))
    await driver.store.settled()
    first_block = decode(manifest_of(tmp_path, "broken").read_bytes()).blocks[0]
    await driver.put("whole", context([1] * 300))
    await driver.put("illegible", context([2] * 300))
    await driver.close()
    lose_all_but_manifests(tmp_path)
    lost = [path for path in blocks_of(tmp_path) if path.name.startswith(first_block)]
    lost[0].unlink()
    manifest_of(tmp_path, "illegible").write_bytes(b"{}")
    driver = await Driver.open(tmp_path)
    assert [record.agent_id for record in driver.store.agents(TENANT)] == ["whole"]
    (said,) = [record.getMessage() for record in caplog.records if "was rebuilt" in record.getMessage()]
    assert "1 agents did not: 'broken' of tenant 't' (no file has its tokens" in said
    assert "1 manifests can't be read: " in said
    await driver.close()
    assert len(list((tmp_path / "quarantine").glob("*.json"))) == 2


async def test_an_agent_of_another_model_comes_back_too(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(500))
    await driver.close()
    lose_index(tmp_path)
    driver = await Driver.open(tmp_path, fingerprint=OTHER_MODEL)
    record = driver.store.agent(TENANT, "a")
    assert record is not None
    assert not record.fingerprint_ok
    await driver.close()
    driver = await Driver.open(tmp_path)
    assert (await driver.reuse("a", context(500))).length == 500
    await driver.close()


async def test_without_manifests_nothing_is_thrown_away(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    await driver.put("a", context(500))
    await driver.close()
    files = blocks_of(tmp_path)
    kept = (tmp_path / "index.sqlite").read_bytes()
    lose_all_but_manifests(tmp_path)
    manifest_of(tmp_path, "a").unlink()
    for _ in range(2):
        with pytest.raises(OperatorError, match="has no readable manifest"):
            await Driver.open(tmp_path)
    assert blocks_of(tmp_path) == files
    # A directory from before there were manifests.
    (tmp_path / "index.sqlite").write_bytes(kept)
    (tmp_path / "agents").rmdir()
    await (await Driver.open(tmp_path)).close()
    lose_index(tmp_path)
    driver = await Driver.open(tmp_path)
    assert (await driver.reuse("a", context(500))).length == 500
    await driver.close()


async def test_start_puts_manifests_right(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path)
    for agent in "abc":
        await driver.put(agent, context(500))
    await driver.store.settled()
    old = manifest_of(tmp_path, "a").read_bytes()
    await driver.put("a", context(600))
    await driver.close()
    manifest_of(tmp_path, "a").write_bytes(old)
    manifest_of(tmp_path, "b").write_bytes(b"torn")
    manifest_of(tmp_path, "c").unlink()
    manifest_of(tmp_path, "nobody").write_bytes(old)
    (tmp_path / "agents" / "x.json.7.tmp").write_bytes(b"")
    driver = await Driver.open(tmp_path)
    await driver.close()
    found = {decode(path.read_bytes()).agent_id: path for path in (tmp_path / "agents").iterdir()}
    assert found.keys() == {"a", "b", "c"}
    assert decode(found["a"].read_bytes()).spans[-1][2] == 600
    with pytest.raises(BadManifest, match="checksum"):
        decode(old.replace(b'"revision":1', b'"revision":2'))


class CountingFiles(Files):
    """Counts the manifests written and the syncs of their folder."""

    def __init__(self) -> None:
        super().__init__(Durability.FSYNC)
        self.manifests = self.folder_syncs = 0

    def rename(self, source: Path, target: Path) -> None:
        self.manifests += target.parent.name == "agents"
        super().rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        self.folder_syncs += folder.name == "agents"
        super().sync_folder(folder)


async def test_many_commits_share_a_manifest(tmp_path: Path) -> None:
    files = CountingFiles()
    driver = await Driver.open(tmp_path, files=files, manifest_seconds=ENDLESS)
    await driver.put("a", context(5))
    await driver.store.settled()
    for length in range(10, 60, 10):
        for agent in "abc":
            await driver.put(agent, context(length))
    assert files.manifests <= 2
    assert driver.store.stats().disk_bytes >= disk_use(tmp_path)
    await driver.close()
    assert files.manifests <= 5
    assert files.folder_syncs <= 3
    lose_index(tmp_path)
    driver = await Driver.open(tmp_path)
    assert {len(driver.store.tokens(TENANT, agent)) for agent in "abc"} == {50}
    await driver.close()


@pytest.mark.parametrize("layout", [LAYOUTS["append"], LAYOUTS["everything"]])
async def test_a_manifest_that_waits_keeps_what_the_one_on_disk_refers_to(tmp_path: Path, layout: KVLayout) -> None:
    files = RefusingFiles()
    driver = await Driver.open(tmp_path / "data", layout, files=files, retry_seconds=ENDLESS)
    await driver.put("a", context(700))
    await driver.store.settled()
    refuse_manifests = files.rename

    def rename(source: Path, target: Path) -> None:
        if target.parent.name == "agents":
            raise OSError(errno.EIO, "refused")
        refuse_manifests(source, target)

    files.rename = rename  # type: ignore[method-assign]
    _, committed = await driver.put("a", context(260, [9] * 100))
    assert committed.persisted
    await driver.store.settled()
    await driver.close()
    lose_all_but_manifests(tmp_path / "data")
    driver = await Driver.open(tmp_path / "data", layout)
    assert (await driver.reuse("a", context(700))).length == 700
    await driver.close()


class SlowFiles(Files):
    """Doesn't finish a manifest before it may."""

    def __init__(self) -> None:
        super().__init__(Durability.NONE)
        self.may_rename, self.unlinked = threading.Event(), threading.Event()

    def rename(self, source: Path, target: Path) -> None:
        if target.parent.name == "agents":
            self.may_rename.wait(120)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.unlinked.set()


async def test_a_deletion_waits_for_the_manifest_that_is_being_written(tmp_path: Path) -> None:
    files = SlowFiles()
    driver = await Driver.open(tmp_path, files=files)
    await driver.put("a", context(300))
    deletion = asyncio.create_task(driver.store.delete(TENANT, "a"))
    assert not await asyncio.to_thread(files.unlinked.wait, 0.1)
    files.may_rename.set()
    assert await deletion
    assert not manifest_of(tmp_path, "a").exists()
    await driver.close()


async def test_a_deletion_that_the_disk_refuses_leaves_the_agent(tmp_path: Path) -> None:
    files = RefusingFiles()
    driver = await Driver.open(tmp_path, files=files, retry_seconds=ENDLESS)
    await driver.put("a", context(300))
    files.refusal = errno.EROFS
    with pytest.raises(StorageUnavailable):
        await driver.store.delete(TENANT, "a")
    assert (await driver.reuse("a", context(300))).length == 300
    files.refusal = None
    assert await driver.store.delete(TENANT, "a")
    assert not manifest_of(tmp_path, "a").exists()
    await driver.close()
