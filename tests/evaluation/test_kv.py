"""The evaluation of quantised KV, on the built-in model and through the real store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from warmkv_evaluation.kv import Quality, evaluate
from warmkv_evaluation.statistics import interval
from warmkv_evaluation.windows import cut, read_text
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.model import load as model
from warmkv_server.errors import OperatorError
from warmkv_server.text.text import Text


async def scores(contexts: list[int], bits: list[int]) -> list[Quality]:
    results = evaluate(
        "builtin:tiny", read_text(None), contexts=contexts, bits=bits, group_size=64, windows=2, scored=33
    )
    return [result async for result in results]


async def test_fewer_bits_move_the_answers_further() -> None:
    eight, four = await scores([300], [8, 4])
    assert (eight.context, eight.bits, eight.windows, eight.tokens) == (300, 8, 2, 64)
    assert 0 <= eight.divergence < four.divergence
    assert eight.agreement >= four.agreement
    assert four.loaded_bytes < eight.loaded_bytes
    for result in (eight, four):
        assert 1 < result.perplexity < 4096  # better than guessing
        assert result.change_interval[0] <= result.change <= result.change_interval[1]


async def test_unquantised_kv_comes_back_from_the_store_as_it_was() -> None:
    (result,) = await scores([300], [0])
    assert result.divergence == 0
    assert result.agreement == 1
    assert result.change == 0
    assert result.loaded_bytes > 0


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
