"""Facts in a long context, and questions about them: what quantisation of keys costs first."""

from __future__ import annotations

import random
from dataclasses import dataclass

from warmkv_server.contract.content import RawText
from warmkv_server.text.text import Text

_NAMES = (
    *("Alice", "Bruno", "Carla", "David", "Elena", "Frank", "Grace", "Hugo", "Irene", "Jonas"),
    *("Karen", "Liam", "Mona", "Nadia", "Oscar", "Peter", "Rosa", "Simon", "Tara", "Victor"),
)
_QUESTIONS = 10
"""In each context."""


@dataclass(frozen=True)
class Quiz:
    """One context.

    Attributes:
        context: its tokens.
        questions: tokens behind it: each question with its right answer.
        answers: where the answers are in those, as (first, behind the last).
    """

    context: list[int]
    questions: list[int]
    answers: list[tuple[int, int]]


def quizzes(text: Text, filler: str, length: int, count: int) -> list[Quiz]:
    """So many contexts of at most `length` tokens: notes strewn over a text."""
    return [_quiz(text, filler, length, random.Random(f"recall {length} {number}")) for number in range(count)]


def _quiz(text: Text, filler: str, length: int, chance: random.Random) -> Quiz:
    def tokens(said: str, *, starts: bool = False) -> list[int]:
        content = RawText(said)
        found: list[int] = text.encode(
            content, starts=starts, ending="raw", held=0, tail=(), answer=False
        ).tokens.tolist()
        return found

    names = chance.sample(_NAMES, _QUESTIONS)
    codes = {name: str(chance.randrange(1000, 9999)) for name in names}
    notes = [tokens(f"\n\nNote: the code of {name} is {codes[name]}.\n\n") for name in names]
    at = chance.randrange(max(1, len(filler) - 8 * length))
    between = tokens(filler[at : at + 8 * length])[: length - sum(map(len, notes)) - 1]
    places = sorted(chance.sample(range(1, len(between)), len(notes)))
    context = tokens("\n", starts=True)
    for start, end, note in zip([0, *places], [*places, len(between)], [*notes, []], strict=True):
        context += between[start:end] + note
    questions: list[int] = []
    answers: list[tuple[int, int]] = []
    for name in chance.sample(names, len(names)):
        questions += tokens(f"\n\nNote: the code of {name} is")
        answer = tokens(f" {codes[name]}")
        answers.append((len(questions), len(questions) + len(answer)))
        questions += [*answer, *tokens(".")]
    return Quiz(context, questions, answers)
