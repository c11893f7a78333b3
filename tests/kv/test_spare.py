"""Memory that is had again: never while anything refers to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.kv.driver import TENANT, Driver, eventually
from tests.kv.words import context
from warmkv_server.contract.kv import KVLayout, PartKind, TensorSpec
from warmkv_server.kv.blocks.arrays import RecycledArrays, SpareMemory, view
from warmkv_server.kv.tasks import loader

SPEC = TensorSpec("words", PartKind.APPEND, "uint32", (16, 4, 16), 16 * 4 * 16 * 4)
SIZE = SPEC.nbytes * 256
"""A MiB."""


def part_of(spare: SpareMemory, value: int, count: int = 256) -> RecycledArrays:
    (part,) = spare.parts([([SPEC], count)])
    view(part["words"])[...] = value
    return part


def address(array: mx.array) -> int:
    return int(view(array).ctypes.data)


def test_memory_that_nobody_holds_is_had_again() -> None:
    spare = SpareMemory(4 * SIZE)
    part = part_of(spare, 7)
    at = address(part["words"])
    del part
    again = part_of(spare, 8)
    assert address(again["words"]) == at
    assert np.all(view(again["words"]) == 8)


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(lambda array: array, id="the array"),
        pytest.param(view, id="its memory"),
        pytest.param(lambda array: array[3], id="a slice that isn't evaluated"),
        pytest.param(lambda array: _evaluated(array[3]), id="a slice"),
        pytest.param(lambda array: array + 0, id="a sum that isn't evaluated"),
        pytest.param(lambda array: memoryview(array), id="a buffer"),
    ],
)
def test_what_is_still_held_keeps_its_values(hold: Callable[[mx.array], Any]) -> None:
    spare = SpareMemory(4 * SIZE)
    part = part_of(spare, 7)
    held = hold(part["words"])
    del part
    again = part_of(spare, 8)
    assert np.all(np.array(held) == 7)
    assert np.all(view(again["words"]) == 8)


def test_two_parts_never_share_memory() -> None:
    spare = SpareMemory(4 * SIZE)
    for _ in range(3):
        parts = [part_of(spare, value) for value in range(6)]
        assert all(np.all(view(part["words"]) == value) for value, part in enumerate(parts))
        del parts


def test_no_more_is_kept_than_the_limit_and_nothing_after_a_rest() -> None:
    spare = SpareMemory(2 * SIZE + SIZE // 2)
    parts = [part_of(spare, value) for value in range(4)]
    parts.clear()
    assert spare.nbytes == 2 * SIZE
    short = part_of(spare, 1, count=64)  # of another shape
    assert spare.nbytes == 2 * SIZE
    spare.rest()
    assert spare.nbytes == 0
    del short
    assert spare.nbytes == 0
    part = part_of(spare, 1)
    del part
    assert spare.nbytes == SIZE  # it is used again


async def test_a_store_reads_into_what_left_ram_and_lets_go_of_it_after_a_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = await Driver.open(tmp_path, KVLayout((SPEC,)))
    spare = driver.store.core.spare
    await driver.put("a", context(600))
    for _ in range(2):
        await driver.store.evict(TENANT, "a")
        assert (await driver.reuse("a", context(600))).warm_tokens == 600  # the driver compares every word
    await driver.store.evict(TENANT, "a")
    assert spare.nbytes >= 2 * SIZE
    monkeypatch.setattr(loader, "REST_SECONDS", 0.0)
    await driver.reuse("a", context(600))
    await eventually(lambda: spare.resting)
    await driver.store.evict(TENANT, "a")
    assert spare.nbytes == 0
    await driver.close()


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array
