"""Small tokenizers in the styles that others come in, trained here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    "Hello! It's 2 o'clock, don't you know ? Über 日本語 नमस्ते 👩‍🚀🙂\n\n\tdef f(x):\n        return x # ok \0 "
    "<s> </s> ▁ <0x41> é  two  spaces, and a long-ish word: antidisestablishmentarianism."
)
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


TRAINED: Mapping[str, Callable[[], Tokenizer]] = {
    "first": lambda: metaspace(strips=True, scheme="first"),
    "always": lambda: metaspace(strips=True, scheme="always"),
    "gemma": lambda: metaspace(strips=False, scheme=None),
    "words": words,
    "suffixes": suffixes,
    "unigram": unigram,
}


def write(name: str, folder: Path) -> None:
    """Write one of `TRAINED` as a folder has it."""
    TRAINED[name]().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
