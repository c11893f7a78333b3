"""The figures of the store: their arithmetic against what is on disk, on contexts of a few blocks."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from warmkv_evaluation.store_contexts import block_files, extend, opened, tokens_of
from warmkv_evaluation.store_growth import Growth, grow, written_bytes
from warmkv_evaluation.store_load import WAYS, measure
from warmkv_evaluation.store_readers import HASHED, KEPT, READER, REUSED, Readers
from warmkv_evaluation.store_rest import rest
from warmkv_evaluation.store_save import Save
from warmkv_evaluation.store_shapes import BUILTIN, shape_of
from warmkv_server.cli.main import app
from warmkv_server.contract.kv import BLOCK_TOKENS, PartKind
from warmkv_server.kv.blocks import blockfile


def test_shapes_are_those_of_the_real_models() -> None:
    eight, gemma, deepseek = (shape_of(name) for name in ("llama-3.1-8b", "gemma-3-12b", "deepseek-v2-lite"))
    # Gemma: 8 of 48 layers see everything, the others 1,024 tokens. DeepSeek: keys of 128 + 64, values of 128.
    assert eight.fp16_bytes(1000) == 2 * 32 * 2 * 8 * 128 * 1000
    assert gemma.fp16_bytes(3000) == 2 * 2 * 8 * 256 * (8 * 3000 + 40 * 1024)
    assert deepseek.fp16_bytes(1000) == 2 * 27 * 16 * (192 + 128) * 1000
    assert eight.cache_map.layout.nbytes(PartKind.APPEND) == 36_864  # 4.5 bits a value
    assert shape_of("llama-3.1-8b", 32).cache_map.layout.nbytes(PartKind.APPEND) == 40_960


async def test_what_growth_writes_is_what_is_on_disk_when_nothing_is_written_twice(tmp_path: Path) -> None:
    shape = shape_of(BUILTIN)
    growth = await grow(shape, tmp_path, tokens=2 * BLOCK_TOKENS, turn=BLOCK_TOKENS, commits=1)
    # Turns of one block: no segment is merged.
    assert growth.block_bytes == growth.files_bytes
    assert growth.files_bytes > growth.kv_bytes == 2 * BLOCK_TOKENS * shape.cache_map.layout.nbytes(PartKind.APPEND)
    if growth.written_bytes is not None:
        assert growth.written_bytes >= growth.block_bytes + growth.index_bytes // 2
        assert growth.amplification == growth.written_bytes / growth.kv_bytes
    merged = await grow(shape, tmp_path / "again", tokens=2 * BLOCK_TOKENS, turn=BLOCK_TOKENS // 2, commits=1)
    # Every second turn merges the segment before it.
    assert merged.block_bytes > 1.4 * growth.block_bytes
    assert merged.files_bytes == growth.files_bytes


async def test_system_calls_count_the_files_and_the_index(tmp_path: Path) -> None:
    before = written_bytes()
    if before is None:
        pytest.skip("this system doesn't count what a process writes")
    layout = shape_of(BUILTIN).cache_map.layout
    async with opened(tmp_path, layout) as store:
        await extend(store, layout, "agent", tokens_of(300), np.random.default_rng(0))
    written = (written_bytes() or 0) - before
    least = sum(block_files(tmp_path).values())
    assert least < written < least + (2 << 20)  # the index with its log, and its reserve of a MiB


async def test_loads_and_plain_reads_are_of_the_same_files(tmp_path: Path) -> None:
    shape = shape_of(BUILTIN)
    (times,) = await measure(shape, tmp_path, tokens=600, repeats=2, joins=1, dropped=[False])
    assert times.files == 3
    assert times.nbytes > 600 * shape.cache_map.layout.nbytes(PartKind.APPEND)
    assert {way: len(seconds) for way, seconds in times.seconds.items()} == dict.fromkeys(WAYS, 2)
    assert len(times.join_seconds) == 1


async def test_every_way_of_reading_reads_everything(tmp_path: Path) -> None:
    layout = shape_of(BUILTIN).cache_map.layout
    async with opened(tmp_path, layout) as store:
        await extend(store, layout, "agent", tokens_of(1200), np.random.default_rng(0))
    files = list(block_files(tmp_path))
    contents = [path.read_bytes() for path in files]
    with Readers(files, blockfile.ordered(layout.of_kind(PartKind.APPEND)), threads=2) as readers:
        assert readers.nbytes == sum(map(len, contents))
        by_thread = [contents[0::2], contents[1::2]]
        for way in (KEPT, HASHED):
            for buffer in chain(*readers.read(way)[1]):
                buffer[:] = 0
            assert [[bytes(buffer) for buffer in held] for held in readers.read(way)[1]] == by_thread
        assert [bytes(held[-1]) for held in readers.read(REUSED)[1]] == [share[-1] for share in by_thread]
        assert readers.timed(READER) > 0
        files[0].write_bytes(bytes(len(contents[0])))
        with pytest.raises(blockfile.BadFile):
            readers.timed(READER)


async def test_a_context_at_rest_takes_its_words(tmp_path: Path) -> None:
    for group_size, least in ((64, 3.5), (32, 3.1)):
        shape = shape_of(BUILTIN, group_size)
        found = await rest(shape, tmp_path / str(group_size), tokens=1024, turn=100)
        assert found.disk_bytes == found.file_bytes == found.append_file_bytes
        assert found.ram_bytes == 1024 * shape.cache_map.layout.nbytes(PartKind.APPEND)
        assert found.fp16_bytes / found.ram_bytes > least


def test_ratios_are_of_medians_and_percentiles() -> None:
    growth = Growth("x", 100, 10, 1000, 1500, 300, 2000, 1100, (0.1, 0.2, 0.9), (0.3, 0.4, 0.8))
    assert growth.amplification == 2.0
    assert growth.flatness == pytest.approx(2.0)
    save = Save("m", "s", 10, 100, (0.01,) * 100, (0.03,) * 50, (0.1,))
    assert save.ratio == pytest.approx(3.0)


def test_the_command_measures_every_part(tmp_path: Path) -> None:
    small = ["--contexts", "512", "--rest-tokens", "512", "--repeats", "1", "--commits", "1", "--rounds", "1"]
    where = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["eval", "store", "--parts", "growth,rest,save", *small, *where])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "store.json").read_text())
    assert [growth["shape"] for growth in results["growth"]] == [BUILTIN, "llama-3.1-8b"]
    assert len(results["rest"]) == 6
    assert all(save["alone"] and save["commit_seconds"] for save in results["save"])
    assert "amplification" in (tmp_path / "out" / "store.md").read_text()
    assert not list(tmp_path.glob("warmkv-store-*"))


def test_a_part_that_is_not_there_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["eval", "store", "--parts", "speed"])
    assert done.exit_code == 2
    assert "--parts has 'speed'; it can be any of growth, load, rest, save" in done.output
