"""Contexts of equal tokens whose KV is a function of something else too share nothing with each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kv.books import check_directory, check_sums
from tests.kv.driver import TENANT, Driver
from tests.kv.words import LAYOUTS, context
from warmkv_server.kv.blocks.names import node_id
from warmkv_server.offline.directory import look
from warmkv_server.offline.verify import verify

LAYOUT = LAYOUTS["everything"]
TOKENS = context(600)
IMAGE, OTHER = b"digest of an image", b"of another"


async def lengths(driver: Driver, agent: str) -> list[int]:
    """What a request of the agent reuses with no key, and with each of the two."""
    return [(await driver.reuse(agent, TOKENS, extra_key=key)).length for key in (b"", IMAGE, OTHER)]


async def test_equal_tokens_under_other_keys_share_nothing(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("plain", TOKENS)
    await driver.put("image", TOKENS, extra_key=IMAGE)
    assert await lengths(driver, "") == [600, 600, 0]
    assert await lengths(driver, "plain") == [600, 600, 0]  # others have it with the image
    longer, _ = await driver.put("again", context(600, [3] * 10), extra_key=IMAGE)
    assert (longer.length, longer.shared_tokens) == (600, 600)
    await driver.store.delete(TENANT, "plain")
    await driver.store.settled()
    assert await lengths(driver, "image") == [0, 600, 0]
    check_sums(driver.store)
    check_directory(driver.store, tmp_path)
    await driver.close()
    assert verify(lambda: look(tmp_path)).problems == []


async def test_an_agent_that_gets_another_key_has_another_context(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("a", TOKENS)
    reuse, committed = await driver.put("a", TOKENS, extra_key=IMAGE)
    assert (reuse.length, committed.agent.revision) == (0, 2)
    await driver.store.settled()
    assert await lengths(driver, "a") == [0, 600, 0]
    await driver.close()


@pytest.mark.parametrize("lost", [False, True])
async def test_keys_are_there_after_a_restart_and_without_the_index(tmp_path: Path, lost: bool) -> None:
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("image", TOKENS, extra_key=IMAGE)
    await driver.put("plain", context([2] * 300))
    await driver.close()
    if lost:
        (tmp_path / "index.sqlite").unlink()
    driver = await Driver.open(tmp_path, LAYOUT)
    reuse = await driver.reuse("image", TOKENS, extra_key=IMAGE)
    assert (reuse.length, reuse.warm_tokens) == (600, 600)
    assert await lengths(driver, "image") == [0, 600, 0]
    await driver.close()


def test_without_a_key_ids_are_those_of_version_1() -> None:
    parent, tokens = bytes(range(16)), context(3).tobytes()
    assert (
        node_id(parent, 5, tokens).hex() == node_id(parent, 5, tokens, b"").hex() == "8c5ef0307dfd1cf519ebbfc51cc30e07"
    )
    assert len({node_id(parent, 5, tokens, key) for key in (b"", b"a", b"aa", b"\0")}) == 4
