"""The arithmetic of the memory audit."""

from __future__ import annotations

from pathlib import Path

from warmkv import v1 as pb
from warmkv_bench.memory import block_file_bytes, cache_bytes

TOKENS = 32768


def layer(bits: int = 0, window: int = 0) -> pb.LayerInfo:
    kind = pb.CACHE_KIND_WINDOWED if window else pb.CACHE_KIND_APPEND_ONLY
    return pb.LayerInfo(cache_kind=kind, kv_heads=8, key_dim=256, value_dim=256, kv_bits=bits, window=window)


def test_fp16_is_two_bytes_for_every_value() -> None:
    # 8 heads x (256 + 256) values x 2 bytes
    assert cache_bytes([layer()], TOKENS, 64) == TOKENS * 8192
    assert cache_bytes([layer(bits=4)], TOKENS, 64, fp16=True) == TOKENS * 8192


def test_four_bits_in_groups_of_64_are_three_and_a_half_times_smaller_than_fp16() -> None:
    quantised = cache_bytes([layer(bits=4)], TOKENS, 64)
    # 4 bits and a 64th of two 16-bit numbers: 4.5 bits
    assert quantised == TOKENS * 4096 * 4.5 / 8
    assert round(cache_bytes([layer()], TOKENS, 64) / quantised, 2) == 3.56


def test_a_window_holds_no_more_than_its_size() -> None:
    assert cache_bytes([layer(window=1024)], TOKENS, 64) == 1024 * 8192
    assert cache_bytes([layer(window=1024)], 100, 64) == 100 * 8192


def test_a_mix_of_global_and_windowed_layers() -> None:
    # Gemma 3 12B: 8 layers see everything, 40 see 1,024 tokens. Not the 22.5 GB of 48 full layers with 16 heads.
    layers = [layer() for _ in range(8)] + [layer(window=1024) for _ in range(40)]
    assert cache_bytes(layers, TOKENS, 64) == (8 * TOKENS + 40 * 1024) * 8192
    assert round(cache_bytes(layers, TOKENS, 64) / 2**30, 2) == 2.31


def test_composite_layers_count_their_members_and_recurrent_ones_nothing() -> None:
    composite = pb.LayerInfo(
        cache_kind=pb.CACHE_KIND_COMPOSITE, members=[pb.LayerInfo(cache_kind=pb.CACHE_KIND_RECURRENT), layer()]
    )
    assert cache_bytes([composite], 100, 64) == 100 * 8192


def test_block_files_are_counted_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "a.safetensors").write_bytes(bytes(100))
    (tmp_path / "index.sqlite").write_bytes(bytes(1000))
    assert block_file_bytes(tmp_path) == 100
