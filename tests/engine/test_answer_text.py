"""An answer's text, as tokens come: whole characters, no stop string, nothing lost."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tokenizers import built_in, ids, variant
from tests.engine.trained import TRAINED, metaspace, write
from warmkv_server.engine.model import tokenizer as tokenizers
from warmkv_server.engine.output.answer_text import AnswerText, Spelling

END, ASSISTANT = 1, 5
ORDINARY = range(6, 4096)
SPELLING = Spelling(built_in())

texts = st.text(
    st.sampled_from("abc the ing")
    | st.sampled_from(" \n\t123.,é日本🙂👩‍🚀\u0301")
    | st.characters(exclude_categories=["Cs"])
)


def answer(stop: Sequence[str] = (), before: int = ASSISTANT) -> AnswerText:
    return AnswerText(SPELLING, [before], {END}, stop)


@settings(deadline=None)
@given(texts)
def test_the_pieces_are_the_text_and_never_part_of_a_character(text: str) -> None:
    under_test, sent = answer(), ""
    for token in ids(built_in(), text):
        sent += under_test.push(token)
        assert text.startswith(sent)
    assert sent + under_test.finish() == text


@settings(deadline=None)
@given(st.lists(st.sampled_from(ORDINARY), max_size=30))
def test_any_tokens_read_as_the_tokenizer_decodes_them(tokens: list[int]) -> None:
    under_test = answer()
    joined = "".join(under_test.push(token) for token in tokens) + under_test.finish()
    prompt = built_in().decode([ASSISTANT])
    assert prompt + joined == built_in().decode([ASSISTANT, *tokens])


def test_end_of_sequence_has_no_text() -> None:
    under_test = answer()
    assert [under_test.push(token) for token in [*ids(built_in(), "so"), END]] == ["so", ""]
    assert under_test.finish() == ""


@pytest.mark.parametrize(("before", "first"), [(ASSISTANT, " the"), (ids(built_in(), "one")[-1], " the")])
def test_the_space_before_the_first_word_stays(before: int, first: str) -> None:
    assert answer(before=before).push(ids(built_in(), first)[0]) == first


def first_match(text: str, stop: Sequence[str]) -> tuple[str, int] | None:
    """The stop string that is complete first (of several, the longest), and where it ends."""
    for end in range(1, len(text) + 1):
        complete = [each for each in stop if text[:end].endswith(each)]
        if complete:
            return max(complete, key=len), end
    return None


@st.composite
def stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and strings that may be in it, across tokens and beside each other."""
    text = draw(texts.filter(lambda text: len(text) > 2))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text) - 1))
        piece = text[start : draw(st.integers(start + 1, min(len(text), start + 6)))]
        found.append(draw(st.sampled_from([piece, piece + "x", "x" + piece])))
    return text, list(dict.fromkeys(found))


@settings(deadline=None, max_examples=200)
@given(stops())
def test_a_stop_string_ends_the_text_before_it(given_: tuple[str, list[str]]) -> None:
    text, stop = given_
    tokens = ids(built_in(), text)
    under_test, sent, pushed = answer(stop), "", 0
    while pushed < len(tokens) and not under_test.matched_stop:
        sent += under_test.push(tokens[pushed])
        pushed += 1
        assert text.startswith(sent)
    if not under_test.matched_stop:
        sent += under_test.finish()

    match = first_match(text, stop)
    if match is None:
        assert (sent, under_test.matched_stop) == (text, "")
        return
    matched, end = match
    assert under_test.matched_stop == matched
    assert sent == text[: end - len(matched)]
    # Of the tokens pushed, those that start behind the match don't belong to the answer; the first always does.
    starts = accumulate((len(built_in().convert_ids_to_tokens(token)) for token in tokens[:pushed]), initial=0)
    behind = sum(start >= len(text[:end].encode()) for start in list(starts)[1:-1])
    assert under_test.tokens_behind_stop() == behind


def test_a_lone_space_is_text_at_once() -> None:
    tokens = ids(built_in(), "a 1")
    assert len(tokens) == 3
    under_test = answer([" "])
    assert [under_test.push(token) for token in tokens[:2]] == ["a", ""]
    assert under_test.matched_stop == " "
    assert under_test.tokens_behind_stop() == 0


@pytest.mark.parametrize("stop", ["🙂", "🙂n"])
def test_a_stop_string_across_the_bytes_of_a_character(stop: str) -> None:
    tokens = ids(built_in(), "no🙂")
    assert len(tokens) > 2, "the character must take several tokens"
    tokens += ids(built_in(), stop.removeprefix("🙂"))
    under_test = answer([stop])
    assert "".join(under_test.push(token) for token in tokens) == "no"
    assert under_test.matched_stop == stop
    assert under_test.tokens_behind_stop() == 0


def test_what_may_become_a_stop_string_is_held_back_and_given_back() -> None:
    under_test = answer(["user:", "used"])
    pieces = [under_test.push(token) for token in ids(built_in(), " u")] + [
        under_test.push(token) for letter in "sers" for token in ids(built_in(), letter)
    ]
    assert "".join(pieces[:-1]) == " "
    assert pieces[-1] == "users"


@pytest.mark.parametrize("style", TRAINED)
def test_any_style_of_tokenizer_reads_as_it_decodes(style: str, tmp_path: Path) -> None:
    """Whole runs of single bytes, broken ones too, spaces that go away, ids that the tokenizer doesn't have."""
    write(style, tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    spelling, known = Spelling(tokenizer), sorted(tokenizer.get_vocab().values())
    odd = [*sorted(spelling.bytes), *known[:20], known[-1] + 7] * 3 + known
    chance = random.Random(3)
    for _ in range(100):
        prompt, tokens = chance.choices(known, k=chance.randrange(1, 9)), chance.choices(odd, k=chance.randrange(30))
        under_test = AnswerText(spelling, prompt, (), ())
        joined = "".join(under_test.push(token) for token in tokens) + under_test.finish()
        before, whole = spelling.text(prompt), spelling.text(prompt + tokens)
        same = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        assert joined == whole[min(same, len(whole)) :], (prompt, tokens)


def test_long_runs_of_single_bytes_come_before_the_answer_ends(tmp_path: Path) -> None:
    write("first", tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    faces = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🙃".encode() * 100]
    under_test = AnswerText(Spelling(tokenizer), ids(tokenizer, "so"), (), ())
    pieces = [under_test.push(token) for token in faces]
    assert len("".join(pieces)) > 80
    assert "".join(pieces) + under_test.finish() == "🙃" * 100


def test_words_of_other_letters_that_were_added_are_text(tmp_path: Path) -> None:
    tokenizer = variant(tmp_path, special=["điều", "日本é"])
    under_test = AnswerText(Spelling(tokenizer), [ASSISTANT], {END}, ())
    assert [under_test.push(token) for token in (4096, 4097)] == ["điều", "日本é"]


def test_bytes_under_anothers_decoder_are_read_as_bytes(tmp_path: Path) -> None:
    """As some published files have it: byte pairs, and SentencePiece's decoder."""
    variant(tmp_path, decoder=json.loads(metaspace(strips=True, scheme="first").to_str())["decoder"])
    tokenizer = tokenizers.load(tmp_path)
    text = "Hello! Über 日本\n"
    under_test = AnswerText(Spelling(tokenizer), [ASSISTANT], {END}, ())
    assert "".join(under_test.push(token) for token in ids(tokenizer, text)) + under_test.finish() == text
