"""Codecs that are made for a model: what is chosen for its streams, what is told of it, and that it is kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.positional_encoding import RoPE

from tests.engine.families import FAMILIES, VOCAB, build
from tests.engine.test_calibration import runner as with_outliers
from warmkv_server.contract.kv_choice import PRESETS, CodecName, KvChoice
from warmkv_server.engine.cache.codecs.codec import KEYS, VALUES, Finding
from warmkv_server.engine.model.choosing import choose, plan_of, say
from warmkv_server.engine.model.constants import Constants, StreamConstants, keep, kept
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.errors import OperatorError

POSITIONS = 4096
TEXT = [(5 * n * n + 3 * n) % VOCAB for n in range(300)]


def found(model: ModelRunner, said: str = "o4", group_size: int = 64) -> Constants:
    return choose(model, KvChoice.read(said), group_size, TEXT, None, POSITIONS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_codecs_or_is_told_why_not(name: str) -> None:
    """And what they lose is told; those with other dimensions get groups of another size."""
    constants = found(ModelRunner(build(name)))
    for own in constants.streams.values():
        assert own.finding.loss < 0.15
        assert own.codec == CodecName("o", 4) or own.finding.reason
        if own.basis is not None:
            assert own.basis.back.shape[-1] % own.group_size == 0
    if name in ("llama", "qwen3", "gemma3_text", "phi3_head_dim_96"):
        assert {own.codec for own in constants.streams.values()} == {CodecName("o", 4)}
        assert all(bool(own.rotated_by) == (side == KEYS) for (_, side), own in constants.streams.items())


def test_outliers_that_defeat_the_simple_codec_cost_nothing() -> None:
    """A bias is the same for all tokens before they are rotated."""
    constants = found(with_outliers(120.0))
    assert {own.codec for own in constants.streams.values()} == {CodecName("o", 4)}
    assert max(own.finding.loss for own in constants.streams.values()) < 0.05
    (worst,) = (own for stream, own in found(with_outliers(120.0), "affine4").streams.items() if stream == (1, KEYS))
    assert worst.codec != CodecName("affine", 4)


def test_a_rotation_that_is_not_known_is_left_alone_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")

    class RopeOfItsOwn(RoPE):
        def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
            rotated: mx.array = super().__call__(x, offset)
            return rotated * (1 + 0.01 * mx.abs(x).mean())

    for layer in model.layers:
        layer.self_attn.rope = RopeOfItsOwn(64)
    runner, choice = ModelRunner(model), KvChoice.read("o4")
    constants = found(runner)
    assert not any(own.rotated_by for own in constants.streams.values())
    keys = constants.streams[0, KEYS]
    assert keys.finding.reason == "" or "RopeOfItsOwn" in keys.finding.reason
    with caplog.at_level(logging.INFO):
        say(plan_of(constants, model, choice, 64, POSITIONS), "it")
    assert "it: KV as o4" in caplog.text


def test_the_text_is_too_short_for_a_model_of_few_positions() -> None:
    assert not choose(ModelRunner(build("llama")), KvChoice.read("o4"), 64, TEXT[:20], None, 20).streams


def test_sides_are_chosen_apart() -> None:
    streams = found(ModelRunner(build("llama")), "k=o5,v=exact").streams
    assert {own.codec for (_, side), own in streams.items() if side == KEYS} == {CodecName("o", 5)}
    assert {own.codec for (_, side), own in streams.items() if side == VALUES} == {CodecName("exact", 0)}


def test_constants_are_found_again_bit_for_bit(tmp_path: Path) -> None:
    first = found(ModelRunner(build("qwen3")))
    assert kept(tmp_path / "codecs", "key") is None
    assert keep(tmp_path / "codecs", "key", first) is first
    again = kept(tmp_path / "codecs", "key")
    assert again is not None
    assert again.digest == first.digest
    for stream, own in first.streams.items():
        other = again.streams[stream]
        assert (own.codec, own.group_size, own.finding, own.rotated_by) == (
            other.codec,
            other.group_size,
            other.finding,
            other.rotated_by,
        )
        assert own.basis is not None
        assert other.basis is not None
        for mine, theirs in zip(vars(own.basis).values(), vars(other.basis).values(), strict=True):
            assert np.array_equal(mine, theirs)
    assert [path.name for path in (tmp_path / "codecs").iterdir()] == ["key.npz"]


def test_of_two_who_keep_constants_the_first_one_counts(tmp_path: Path) -> None:
    mine, other = (Constants({(0, 0): StreamConstants(CodecName("affine", bits), 64, Finding(0.5))}) for bits in (4, 8))
    keep(tmp_path, "key", mine)
    assert keep(tmp_path, "key", other).digest == mine.digest != other.digest


def test_damaged_constants_are_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep(tmp_path, "key", Constants({(0, 0): StreamConstants(CodecName("affine", 4), 64, Finding(0.5))}))
    path = tmp_path / "key.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert kept(tmp_path, "key") is None
    assert "can't be read" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["key.damaged"]


def test_constants_that_can_not_be_kept_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "codecs").write_text("a file")
    with pytest.raises(OperatorError, match="can't be kept in"):
        keep(tmp_path / "codecs", "key", Constants({}))


@pytest.mark.parametrize(
    "said", [*PRESETS, "o4", "hadamard-5", "affine8", "k=o5,v=o4", "v=exact,k=o4", "k=quality,v=o3"]
)
def test_what_is_said_can_be_said_back(said: str) -> None:
    choice = KvChoice.read(said)
    assert KvChoice.read(str(choice)) == choice


@pytest.mark.parametrize("said", ["", "o", "o7", "best", "k=o4", "k=o4,k=o5", "k=o4,v=o4,", "affine0", "exact4"])
def test_what_can_not_be_said(said: str) -> None:
    with pytest.raises(ValueError, match="k=o5,v=o4"):
        KvChoice.read(said)
