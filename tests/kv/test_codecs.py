"""What a file says of how its streams are coded: one word for a family, or one for each stream."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tests.kv.driver import TENANT, Driver
from tests.kv.words import FULL, SLIDING, context
from warmkv_server.contract.kv import Fallback, KVLayout, TensorSpec


def coded(specs: tuple[TensorSpec, ...], *codecs: str) -> tuple[TensorSpec, ...]:
    return tuple(dataclasses.replace(spec, codecs=codecs) for spec in specs)


ALIKE = KVLayout((*coded(FULL, *["affine-4-64"] * 4), *SLIDING), window=300)
OTHERWISE = KVLayout((*coded(FULL, *["affine-8-64"] * 4), *SLIDING), window=300)
BY_STREAM = KVLayout((*coded(FULL, *["affine-8-64", "affine-4-64"] * 2), *SLIDING), window=300)


def said(data_dir: Path, kind: str) -> object:
    """In the header of a file of this kind."""
    path = next(data_dir.glob(f"blocks/*/*.{kind}.*"))
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return json.loads(metadata["codecs"]) if "codecs" in metadata else None


async def test_headers_say_how_each_stream_is_coded(tmp_path: Path) -> None:
    for name, layout, expected in (
        ("alike", ALIKE, "affine-4-64"),
        ("apart", BY_STREAM, list(BY_STREAM.tensors[0].codecs)),
    ):
        driver = await Driver.open(tmp_path / name, layout)
        await driver.put("a", context(300))
        await driver.close()
        assert said(tmp_path / name, "append") == {"kv0": expected}
        assert said(tmp_path / name, "window") is None


async def test_a_file_that_is_coded_otherwise_is_not_read_as_if_it_were_not(tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path, ALIKE)
    await driver.put("a", context(300))
    await driver.close()
    driver = await Driver.open(tmp_path, OTHERWISE)
    reuse = await driver.reuse("a", context(300))
    assert (reuse.length, reuse.fallback) == (0, Fallback.FORMAT)
    assert driver.store.agent(TENANT, "a") is not None
    await driver.close()
