"""The evaluation of quantised KV, on the built-in model and through the real store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from warmkv_evaluation import kv_report
from warmkv_evaluation.kv import Quality, evaluate
from warmkv_evaluation.statistics import interval
from warmkv_evaluation.windows import cut, read_text
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.model import load as model
from warmkv_server.errors import OperatorError
from warmkv_server.text.text import Text


async def scores(contexts: list[int], kv: list[str], asked: int = 0) -> list[Quality]:
    results = evaluate(
        "builtin:tiny", read_text(None), contexts=contexts, kv=kv, group_size=64, windows=2, scored=33, asked=asked
    )
    return [result async for result in results]


async def test_a_better_codec_moves_the_answers_less(tmp_path: Path) -> None:
    eight, four, made = rows = await scores([300], ["affine8", "affine4", "quality"], asked=1)
    assert (eight.context, eight.kv, eight.windows, eight.tokens) == (300, "affine8", 2, 64)
    assert 0 <= eight.divergence.value < made.divergence.value < four.divergence.value
    assert eight.agreement.value >= four.agreement.value
    assert made.loaded_bytes < four.loaded_bytes < eight.loaded_bytes
    assert 4.375 < made.bits < four.bits < 5 < 8.5 < eight.bits < 9
    for result in rows:
        assert 1 < result.perplexity < 4096  # better than guessing
        assert result.change.low <= result.change.value <= result.change.high
        assert result.median_divergence <= result.p99_divergence
        assert result.asked == 10
    kv_report.write("builtin:tiny", rows, tmp_path)
    assert len((tmp_path / "kv.md").read_text().splitlines()) == len(kv_report.HEAD) + 3
    assert (tmp_path / "kv.png").read_bytes().startswith(b"\x89PNG")


async def test_unquantised_kv_comes_back_from_the_store_as_it_was() -> None:
    (result,) = await scores([300], ["exact"], asked=1)
    assert result.divergence.value == 0
    assert result.agreement.value == 1
    assert result.change.value == 0
    assert result.recalled in (None, 1)
    assert result.bits > 32


async def test_what_is_no_way_of_storing_is_one_sentence() -> None:
    with pytest.raises(OperatorError, match="--kv can't be 'o7'"):
        await scores([300], ["o7"])


def test_interval_narrows_with_more_windows() -> None:
    values = np.random.default_rng(1).normal(5, 1, 400)
    low, high = interval(values[:10])
    narrow_low, narrow_high = interval(values)
    assert low < values[:10].mean() < high
    assert narrow_high - narrow_low < (high - low) / 3


def test_windows_start_a_context_each_and_have_the_asked_length() -> None:
    loaded = model.load("builtin:tiny", adapter=None, codecs=codecs_for(), context_limit=None)
    text = Text(loaded.tokenizer, loaded.info.vocab_size)
    windows = cut(text, read_text(None), 100, 5)
    assert [len(window) for window in windows] == [100] * 5
    assert len({tuple(window) for window in windows}) == 5
    with pytest.raises(OperatorError, match="fewer than a window of 100"):
        cut(text, "short", 100, 5)


def test_a_text_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="can't be read"):
        read_text(tmp_path / "missing.txt")
