"""Which tokens say the same: one sequence's tokens in the place of another's leave its text as it is."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tokenizers import built_in, ids
from tests.engine.trained import TRAINED, write
from warmkv_server.engine.model import tokenizer as tokenizers
from warmkv_server.engine.output.answer_text import Spelling
from warmkv_server.engine.output.constraint import Vocabulary
from warmkv_server.engine.output.same_text import Alike, SameText, Tokens, common_length, may_say_the_same
from warmkv_server.errors import Unsupported

END, ASSISTANT = 1, 5
SPELLING = Spelling(built_in())

texts = st.text(
    st.sampled_from("abc the ing")
    | st.sampled_from(" \n\t123.,é日本🙂👩‍🚀\u0301\ufffd")
    | st.characters(exclude_categories=["Cs"]),
    max_size=40,
)


@cache
def same() -> SameText:
    return SameText(Vocabulary(built_in(), SPELLING, len(built_in().get_vocab()), {END}), SPELLING)


def array(tokens: Sequence[int]) -> Tokens:
    return np.array(tokens, np.int32)


def spliced(held: Sequence[int], wanted: Sequence[int], found: Alike) -> list[int]:
    return [*held[: found.held], *wanted[found.wanted :]]


def in_pieces(text: str, chance: random.Random) -> list[int]:
    """Tokens of a text as a model may sample it: of pieces, and some of single bytes."""
    tokens: list[int] = []
    while text:
        size = chance.randrange(1, 6)
        tokens += ids(built_in(), text[:size])
        text = text[size:]
    return tokens


@settings(deadline=None, max_examples=100)
@given(st.lists(texts, min_size=1, max_size=5), texts, st.integers(0, 1 << 32))
def test_all_earlier_answers_are_found_however_they_were_sampled(answers: list[str], last: str, seed: int) -> None:
    chance = random.Random(seed)
    held = [token for text in answers for token in (ASSISTANT, *in_pieces(text, chance), END)]
    wanted = [token for text in answers for token in (ASSISTANT, *ids(built_in(), text), END)]
    more = ids(built_in(), last)
    found = same().alike(array(held), array(wanted + more))
    assert (found.held, found.wanted) == (len(held), len(wanted))
    assert (found.changed > 0) == (held != wanted)
    assert built_in().decode(spliced(held, wanted + more, found)) == built_in().decode(wanted + more)
    common = common_length(array(held), array(wanted))
    assert may_say_the_same(SPELLING, array(held), array(wanted), common)


@settings(deadline=None, max_examples=100)
@given(texts, texts, st.integers(0, 1 << 32), st.integers(0, 5))
def test_a_history_that_was_changed_is_found_up_to_there(text: str, other: str, seed: int, cut: int) -> None:
    held = [ASSISTANT, *in_pieces(text, random.Random(seed)), END, *ids(built_in(), "and so on")]
    for wanted in (
        [ASSISTANT, *ids(built_in(), text[: len(text) - cut] + other), END, *ids(built_in(), "and so on")],
        [ASSISTANT, *ids(built_in(), text + other)],
        [ASSISTANT, *ids(built_in(), text[: len(text) - cut])],
    ):
        found = same().alike(array(held), array(wanted))
        assert found.wanted >= common_length(array(held), array(wanted))
        assert built_in().decode(spliced(held, wanted, found)) == built_in().decode(wanted)


@pytest.mark.parametrize("style", ["built in", *TRAINED])
def test_any_tokens_of_any_style(style: str, tmp_path: Path) -> None:
    """Single bytes and marks among them; sequences that begin alike, and lose or gain some tokens."""
    if style == "built in":
        tokenizer = built_in()
    else:
        write(style, tmp_path)
        tokenizer = tokenizers.load(tmp_path)
    spelling, known = Spelling(tokenizer), sorted(tokenizer.get_vocab().values())
    try:
        under_test = SameText(Vocabulary(tokenizer, spelling, known[-1] + 1, {END}), spelling)
    except Unsupported:
        return  # nothing is spliced then
    chance = random.Random(1)
    odd = [*sorted(spelling.bytes), *known[:20]] * 3 + known
    replaced = 0
    for _ in range(300):
        held = [token for _ in range(4) for token in (*chance.choices(odd, k=chance.randrange(9)), END)]
        text = tokenizer.decode([token for token in held if token != END])
        wanted: list[int] = []
        for token in held:  # here and there as the tokenizer writes what it says
            again = ids(tokenizer, tokenizer.decode([token])) if chance.random() < 0.4 else [token]
            wanted += again
        if chance.random() < 0.3:
            wanted.insert(chance.randrange(len(wanted)), chance.choice(odd))
        found = under_test.alike(array(held), array(wanted))
        result = spliced(held, wanted, found)
        assert spelling.text(result) == spelling.text(wanted), (held, wanted, text)
        assert [t for t in result if t == END] == [t for t in wanted if t == END]
        replaced += result != wanted
    if style == "built in":
        assert replaced


def test_an_answer_that_was_cut_within_a_character() -> None:
    """The client was told a sign for what is broken, and sends that."""
    face = in_pieces("🙃", random.Random(0))
    spoken = ids(built_in(), "🙃")
    assert len(spoken) > 1
    held = [ASSISTANT, *ids(built_in(), "So "), *spoken[:-1], END, ASSISTANT, *face, END]
    wanted = [ASSISTANT, *ids(built_in(), built_in().decode(held[1 : held.index(END)])), END, ASSISTANT, *spoken, END]
    found = same().alike(array(held), array(wanted))
    assert (found.held, found.wanted) == (len(held), len(wanted))
    at_the_end = same().alike(array(held[: held.index(END)]), array(wanted))
    assert (at_the_end.held, at_the_end.wanted) == (held.index(END), wanted.index(END))


def test_a_mark_is_not_what_spells_it() -> None:
    mark = str(built_in().decode([END]))
    letters = [token for letter in mark for token in ids(built_in(), letter)]
    assert END not in letters
    assert built_in().decode(letters) == mark
    held, wanted = [ASSISTANT, *letters, 400], [ASSISTANT, END, 400]
    assert same().alike(array(held), array(wanted)) == Alike(1, 1, 0)
    assert same().alike(array(wanted), array(held)) == Alike(1, 1, 0)


def test_other_texts_are_not_worth_a_look() -> None:
    one, other = (array([ASSISTANT, *ids(built_in(), text)]) for text in ("How are you today?", "What is it about?"))
    assert not may_say_the_same(SPELLING, one, other, common_length(one, other))


def test_it_takes_time_in_proportion() -> None:
    """Also where every word is tokenised in another way, and where the last token differs."""

    letters = {letter: ids(built_in(), letter) for letter in "another word of it "}

    def seconds(words: int) -> float:
        text = "another word of it " * words
        wanted = array(ids(built_in(), text))
        held = array([token for letter in text for token in letters[letter]])
        began = time.perf_counter()
        found = same().alike(held, wanted)
        assert found.wanted == len(wanted)
        assert found.held == len(held)
        return time.perf_counter() - began

    seconds(10)
    assert min(seconds(4000) for _ in range(3)) < 30 * max(seconds(400) for _ in range(3)) + 0.5


def test_many_cuts_take_no_more_for_each() -> None:
    """Answers that were all cut within a character, and come back with the sign for what is broken."""
    cut, sign = ids(built_in(), "🙃")[:-1], ids(built_in(), built_in().decode(ids(built_in(), "🙃")[:-1]))

    def seconds(answers: int) -> float:
        held, wanted = array([ASSISTANT, *cut, END] * answers), array([ASSISTANT, *sign, END] * answers)
        began = time.perf_counter()
        found = same().alike(held, wanted)
        assert (found.held, found.wanted) == (len(held), len(wanted))
        return time.perf_counter() - began

    seconds(2)
    assert min(seconds(1000) for _ in range(2)) < 100 * max(seconds(100) for _ in range(3)) + 0.5
