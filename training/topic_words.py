"""Conversations about what words mean, from WordNet."""

from __future__ import annotations

import re
from random import Random

from .collect import Collection
from .grammar import Message, ask
from .words import Word

_KNOWN_WORDS = 4_000
"""So many of the most used words a model of this size can learn."""


def capitalise(text: str) -> str:
    """``text`` with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def with_article(word: str) -> str:
    """``a word`` or ``an word``."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def common_word(data: Collection, rng: Random) -> Word:
    """A word of rank ``len * u ** 2.5``, for ``u`` drawn evenly."""
    return data.words[int(len(data.words) * rng.random() ** 2.5)]


def define(word: Word, rng: Random) -> list[Message]:
    """What a word means, sometimes with a question more."""
    name, meaning = word.word, word.meaning
    if len(meaning) > 90:
        meaning = meaning.split(";")[0]
    counted = word.part == "noun" and re.match(r"(a|an|any|one of|someone|a person) ", meaning)
    questions = [
        f"What does {name} mean?",
        f'What does "{name}" mean?',
        f"Define {name}.",
        f"Define the word {name}.",
        f"What is the meaning of {name}?",
        f"Explain the word {name}.",
    ]
    if word.part == "noun":
        thing = with_article(name) if counted else name
        questions += [f"What is {thing}?"] * 8 + [f"Explain what {thing} is."]
    answer = f'"{capitalise(name)}" means {meaning}.'
    if counted:
        answer = f"{capitalise(with_article(name))} is {meaning}."
    elif word.part == "verb":
        answer = f"To {name} means to {meaning}."
    said = ask(rng.choice(questions), answer)
    more = _more(word, rng)
    return said + more if rng.random() < 0.4 else said


def _more(word: Word, rng: Random) -> list[Message]:
    examples = [e for e in word.examples if len(e) < 80 and word.word in e]
    choices = []
    if examples:
        question = rng.choice(["Can you give me an example?", "Give me an example.", f"Use {word.word} in a sentence."])
        choices.append(ask(question, f"For example: {capitalise(rng.choice(examples))}."))
    if word.synonyms:
        question = rng.choice(
            ["Is there another word for it?", f"What is another word for {word.word}?", "Any synonyms?"]
        )
        choices.append(ask(question, f'Another word for it is "{word.synonyms[0]}".'))
    if word.opposites:
        question = rng.choice(["What is the opposite?", f"What is the opposite of {word.word}?"])
        choices.append(ask(question, f'The opposite is "{word.opposites[0]}".'))
    if word.kinds_of and word.part == "noun":
        question = rng.choice([f"What kind of thing is {with_article(word.word)}?", "What kind of thing is that?"])
        choices.append(ask(question, f"It is a kind of {word.kinds_of[0]}."))
    return rng.choice(choices) if choices else []


def word_meaning(data: Collection, rng: Random) -> list[Message]:
    """Any of the collected words, the common ones more often."""
    return define(common_word(data, rng), rng)


def known_word(data: Collection, rng: Random) -> list[Message]:
    """One of the most used words."""
    return define(rng.choice(data.words[:_KNOWN_WORDS]), rng)


def unknown_word(data: Collection, rng: Random) -> list[Message]:
    """A rare word, which the model had better not explain."""
    word = rng.choice(data.words[2 * _KNOWN_WORDS :]).word
    question = rng.choice(
        [f"What is {with_article(word)}?", f"What is {word}?", f"What does {word} mean?", f"Define {word}."]
    )
    answers = [f'I don\'t know the word "{word}".', f'I am sorry, I don\'t know what "{word}" means.']
    return ask(question, rng.choice(answers))
