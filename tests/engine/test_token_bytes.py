"""How much text one token can stand for: never less than one does, and unknown where any may."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.tokenizers import built_in, ids, variant
from warmkv_server.text.token_bytes import most_bytes_per_token

SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_has_fewer_tokens(text: str) -> None:
    assert len(text.encode()) <= len(ids(built_in(), text)) * most_bytes_per_token(built_in())


def test_the_longest_token_counts() -> None:
    longest = max(built_in().get_vocab(), key=len)
    assert most_bytes_per_token(built_in()) == len(longest)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({"normalizer": {"type": "NFC"}}, 4),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, SPACES]}}, 4),
        ({"normalizer": {"type": "NFKC"}}, 0),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, 0),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}}, 0),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "two words"}, "content": "one"}}, 0),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, 0),
        ({"pre_tokenizer": None}, 0),
    ],
)
def test_tokenizers_that_drop_text_are_known(tmp_path: Path, changes: Mapping[str, Any], times: int) -> None:
    """Neither a text that is composed, nor one of white space, may be refused for its length."""
    changed = variant(tmp_path, changes=changes)
    assert most_bytes_per_token(changed) == times * most_bytes_per_token(built_in())


def test_a_special_token_can_be_the_longest(tmp_path: Path) -> None:
    assert most_bytes_per_token(variant(tmp_path, special=["<|" + "long" * 30 + "|>"])) == 124
