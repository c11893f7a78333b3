"""The way from scenes and documents to weights that mlx-lm loads, in miniature."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import mean

import numpy as np
import pytest
from mlx_lm import generate, load
from tokenizers import Tokenizer

import training
from training import MODEL, prepare, recipe
from training.collect import Collection
from training.documents import Document
from training.facts import Call, Country, Element
from training.grammar import read_grammar
from training.shape import Shape
from training.talks import Talks
from training.tokenizer import BOS_ID
from training.train_mlx import train
from training.trigram import Trigram
from training.words import Word

TOKENIZER = MODEL / "tokenizer.json"
SHAPE = Shape(hidden=64, layers=2, heads=1, kv_heads=1, feed_forward=96, positions=512)


@pytest.fixture(scope="module")
def collection() -> Collection:
    """As `collect` would make it, of text made here."""
    rng = Random(1)
    letters = "bcdfglmnprst"
    names = ["".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(4)) for _ in range(9_000)]
    words = [Word(name, "noun", f"a kind of {names[0]}", 1) for name in sorted(set(names))]
    page = "\n\n".join(
        f"The {a} keeps every {b} in its place, so that nobody looks for it." for a, b in pairwise(names[:100])
    )
    return Collection(
        documents=[Document("manual", f"page {number}", page) for number in range(20)],
        words=words,
        countries=[Country("Norway", "Oslo", "Europe", "Norwegian Krone", well_known=True)],
        elements=[Element("helium", "He", 2, "A light gas.")],
        calls=[Call("os.getcwd", "Python", "Return the current directory.")],
    )


@pytest.fixture(scope="module")
def streams(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    sizes = prepare.Sizes(short=100_000, facts=30_000, medium=30_000, long=30_000)
    prepare.prepare(collection, Tokenizer.from_file(str(TOKENIZER)), sizes, folder)
    return folder


def test_loss_falls_and_mlx_lm_loads_the_result(streams: Path, tmp_path: Path) -> None:
    phases = (recipe.Phase(0.8, 64, {"documents": 0.5, "short": 0.5}), recipe.Phase(0.2, 128, {"facts": 1.0}))
    plan = recipe.Plan(tokens=12 * 512, batch=512, phases=phases)
    losses = train(SHAPE, plan, streams, tmp_path / "model.safetensors", log=lambda _: None)
    assert len(losses) == plan.steps
    assert losses[0] == pytest.approx(np.log(SHAPE.vocab), abs=0.1)  # random weights know nothing
    assert mean(losses[-3:]) < losses[0] - 0.5

    SHAPE.write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    model, tokenizer = load(str(tmp_path))[:2]
    assert isinstance(generate(model, tokenizer, [BOS_ID, 300, 301], max_tokens=4), str)


def test_training_goes_on_from_given_weights(streams: Path, tmp_path: Path) -> None:
    phases = (recipe.Phase(1.0, 64, {"documents": 1.0}),)
    first = recipe.Plan(tokens=8 * 512, batch=512, phases=phases)
    losses = train(SHAPE, first, streams, tmp_path / "first.safetensors", log=lambda _: None)
    again = recipe.Plan(tokens=512, batch=512, phases=phases, seed=2)
    (loss,) = train(
        SHAPE, again, streams, tmp_path / "second.safetensors", start=tmp_path / "first.safetensors", log=lambda _: None
    )
    assert loss < losses[0] - 0.5


def test_same_seed_same_batches(streams: Path) -> None:
    plan = recipe.Plan(tokens=4 * 512, batch=512, phases=(recipe.Phase(1.0, 64, {"short": 0.5, "shelves": 0.5}),))
    once, again = list(plan.batches(streams)), list(plan.batches(streams))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(batch.shape == (8, 65) and (batch[:, 0] == BOS_ID).all() for batch in once)


def test_rates_rise_then_fall_and_never_reach_zero() -> None:
    plan = recipe.Plan(tokens=1_000 * 512, batch=512)
    rates = [plan.rate_at(step) for step in range(plan.steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] > 0


def test_every_scene_can_be_played(collection: Collection) -> None:
    texts = sorted((Path(training.__file__).parent / "texts").glob("*.txt"))
    assert texts
    grammar = read_grammar(texts)
    talks = Talks(collection)
    rng = Random(1)
    for scene in (scene for scenes in talks.grammar.scenes.values() for scene in scenes):
        for _ in range(20):
            for _role, text in talks.grammar.play(scene, rng):
                assert text
                assert not set("{}|") & set(text) or "def " in text, text
    assert grammar.scenes.keys() == talks.grammar.scenes.keys()


def test_a_row_that_does_not_fit_its_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scenes.txt"
    file.write_text("@pet sound: cat, meow | dog\n")
    with pytest.raises(ValueError, match="table pet has the columns"):
        read_grammar([file])


def test_a_line_that_belongs_nowhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scenes.txt"
    file.write_text("> Hello!\nHi!\n")
    with pytest.raises(ValueError, match="neither a table nor a part of a scene: 'Hi!'"):
        read_grammar([file])


def test_long_conversations_ask_back_only_for_what_was_told(collection: Collection) -> None:
    talks = Talks(collection)
    for seed in range(10):
        said = talks.long(Random(seed), 4_000)
        roles = [role for role, _ in said if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert sum(len(text) for _, text in said) >= 4_000


def test_held_out_documents_are_in_no_stream(tmp_path: Path, collection: Collection) -> None:
    documents = [Document("manual", f"page {number}", f"Only page {number} says so. " * 10) for number in range(200)]
    held_out = [document for document in documents if document.held_out]
    assert 1 <= len(held_out) <= 20
    data = Collection(documents, collection.words, collection.countries, collection.elements, collection.calls)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    prepare.prepare(data, tokenizer, prepare.Sizes(short=20_000, facts=5_000, medium=20_000, long=20_000), tmp_path)
    for path in tmp_path.glob("*.npz"):
        text = tokenizer.decode(prepare.load(path).tokens.tolist())
        found = [document.name for document in held_out if document.text[:28] in text]
        assert bool(found) == (path.stem == "held_out_documents"), (path.stem, found)


def test_trigram_is_a_distribution_that_prefers_what_it_saw() -> None:
    vocab = 7
    seen = np.array([1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 3], dtype=np.uint16)
    trigram = Trigram(seen, vocab)
    after = [np.exp(-trigram.losses(np.array([1, 2, token], dtype=np.uint16))[0]) for token in range(vocab)]
    assert sum(after) == pytest.approx(1.0)
    assert max(range(vocab), key=after.__getitem__) == 3
    unseen = [np.exp(-trigram.losses(np.array([6, 5, token], dtype=np.uint16))[0]) for token in range(vocab)]
    assert sum(unseen) == pytest.approx(1.0)
