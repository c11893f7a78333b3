"""Real tokenizers, and one of each style trained here: what is streamed is what decode makes of prompt and answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.engine.tokenizers import built_in, ids
from tests.reference import sources
from tests.reference.conftest import fetched
from warmkv_server.engine.model import tokenizer as tokenizers
from warmkv_server.engine.output.answer_text import AnswerText, Spelling

TEXT = (
    "Hello! It's 2 o'clock, don't you know ? Über 日本語 नमस्ते 👩‍🚀🙂\n\n\tdef f(x):\n        return x # ok \0 "
    "<s> </s> ▁ <0x41> é  two  spaces, and a long-ish word: antidisestablishmentarianism."
)
TRIALS = 150
BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
SPACES = normalizers.Replace(" ", "▁")


def metaspace(strips: bool, scheme: str | None) -> Tokenizer:
    """As SentencePiece has it, with byte fallback."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme is None:
        made.normalizer = SPACES
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=BYTES, show_progress=False))
    return made


def words() -> Tokenizer:
    """As BERT has it: pieces of words, and spaces that go away before a full stop."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    return made


def suffixes() -> Tokenizer:
    """The oldest byte pair encoding: a mark stands at the end of a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return made


TRAINED = {
    "first": lambda: metaspace(strips=True, scheme="first"),
    "always": lambda: metaspace(strips=True, scheme="always"),
    "gemma": lambda: metaspace(strips=False, scheme=None),
    "words": words,
    "suffixes": suffixes,
    "unigram": unigram,
}


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
        TRAINED[name]().save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
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
