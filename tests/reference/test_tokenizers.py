"""Real tokenizers, and one of each style trained here: what is streamed is what decode makes of prompt and answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tests.engine.tokenizers import built_in, ids
from tests.engine.trained import TEXT, TRAINED, write
from tests.reference import sources
from tests.reference.conftest import fetched
from warmkv_server.engine.model import tokenizer as tokenizers
from warmkv_server.engine.output.answer_text import AnswerText, Spelling

TRIALS = 150


@cache
def load(folder: Path) -> TokenizerWrapper:
    return tokenizers.load(folder)


@pytest.fixture(scope="module", params=["built in", "smollm2", *sources.TOKENIZERS, *TRAINED])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenizerWrapper]:
    name = request.param
    if name == "built in":
        yield built_in()
    elif name in TRAINED:
        folder = tmp_path_factory.mktemp("trained")
        write(name, folder)
        yield load(folder)
    elif name == "smollm2":
        yield load(fetched(sources.smollm2))
    else:
        yield load(fetched(lambda: sources.tokenizer(name)))
        load.cache_clear()


def test_what_is_streamed_is_what_decode_adds(tokenizer: TokenizerWrapper) -> None:
    spelling, known = Spelling(tokenizer), sorted(tokenizer.get_vocab().values())
    odd = [*sorted(spelling.bytes), *random.Random(0).sample(known, min(len(known), 300))]
    chance = random.Random(1)
    for _ in range(TRIALS):
        prompt = some(chance, tokenizer, known, odd) or [known[5]]
        answer = some(chance, tokenizer, known, odd)
        under_test, sent = AnswerText(spelling, prompt, (), ()), ""
        for token in answer:
            sent += under_test.push(token)
        sent += under_test.finish()
        before, whole = str(tokenizer.decode(prompt)), str(tokenizer.decode(prompt + answer))
        same = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        assert sent == whole[min(same, len(whole)) :], (prompt, answer)


def some(chance: random.Random, tokenizer: TokenizerWrapper, known: list[int], odd: list[int]) -> list[int]:
    """Tokens of a text, any tokens, or single bytes between others."""
    match chance.randrange(4):
        case 0:
            return chance.choices(known, k=chance.randrange(1, 30))
        case 1:
            return chance.choices(odd, k=chance.randrange(1, 30))
        case 2:
            start = chance.randrange(len(TEXT))
            return ids(tokenizer, TEXT[start : start + chance.randrange(1, 60)])
        case _:
            letters = [
                chr(chance.choice([*range(32, 127), *range(0xA0, 0x3000), *range(0x1F300, 0x1F700)])) for _ in "x" * 20
            ]
            return ids(tokenizer, "".join(letters))
