"""Conversations made from collected facts, and which of them are drawn how often."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from .collect import Collection
from .facts import Country
from .grammar import Message, ask
from .topic_reading import reading
from .topic_words import capitalise, known_word, unknown_word, word_meaning

Topics = dict[Callable[[Collection, Random], list[Message]], int]
"""Topics and how often each is drawn."""


def country(data: Collection, rng: Random) -> list[Message]:
    """Any country."""
    return _about_country(rng.choice(data.countries), rng)


def known_country(data: Collection, rng: Random) -> list[Message]:
    """One of the countries that most people ask about."""
    return _about_country(rng.choice([land for land in data.countries if land.well_known]), rng)


def _about_country(land: Country, rng: Random) -> list[Message]:
    name, capital = land.name, land.capital
    asked: dict[str, list[str]] = {
        f"The capital of {name} is {capital}.": [
            f"What is the capital of {name}?",
            f"What's the capital of {name}?",
            f"Capital of {name}?",
            f"Which city is the capital of {name}?",
        ],
        f"{capital} is the capital of {name}.": [f"{capital} is the capital of which country?"],
        f"{name} is in {land.continent}.": [
            f"Where is {name}?",
            f"On which continent is {name}?",
            f"In which part of the world is {name}?",
        ],
        f"The currency of {name} is the {land.currency}.": [
            f"What is the currency of {name}?",
            f"How do people pay in {name}?",
        ],
        f"{name} is a country or territory in {land.continent}. Its capital is {capital}, "
        f"and people pay with the {land.currency}.": [
            f"Tell me about {name}.",
            f"What is {name}?",
            f"What do you know about {name}?",
        ],
    }
    answer, questions = rng.choice(list(asked.items()))
    return ask(rng.choice(questions), answer)


def element(data: Collection, rng: Random) -> list[Message]:
    """A chemical element."""
    item = rng.choice(data.elements)
    name, symbol, number = item.name, item.symbol, item.number
    first = re.split(r"(?<=[a-z)])\. ", item.note)[0].rstrip(".") + "."
    about = f"{capitalise(name)} is the chemical element with the symbol {symbol} and the number {number}. {first}"
    asked = [
        (f"What is the symbol of {name}?", f"The symbol of {name} is {symbol}."),
        (f"Which element has the symbol {symbol}?", f"{symbol} is {name}."),
        (f"What is the atomic number of {name}?", f"The atomic number of {name} is {number}."),
        (rng.choice([f"Tell me about {name}.", f"What is {name}?"]), about),
    ]
    return ask(*rng.choice(asked))


def call(data: Collection, rng: Random) -> list[Message]:
    """A function or command that a manual describes."""
    item = rng.choice(data.calls)
    question = rng.choice(
        [
            f"What does {item.name} do?",
            f"What does {item.name} do in {item.manual}?",
            f"What is {item.name} for?",
            f"Explain {item.name}.",
            f"What is {item.name} in {item.manual}?",
        ]
    )
    return ask(question, f"{item.name} ({item.manual}): {capitalise(item.does)}")


def sums(data: Collection, rng: Random) -> list[Message]:
    """Additions and subtractions up to 99, and the small multiplication table."""
    del data
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.3:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
    kind = rng.choice("++-*")
    if kind == "-":
        a, b = max(a, b), min(a, b)
    if kind == "*":
        a, b = a % 11, b % 11
    return _sum(a, kind, b, rng)


def small_sum(data: Collection, rng: Random) -> list[Message]:
    """Additions and subtractions up to 12."""
    del data
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    if rng.random() < 0.4:
        return _sum(max(a, b), "-", min(a, b), rng)
    return _sum(a, "+", b, rng)


def _sum(a: int, kind: str, b: int, rng: Random) -> list[Message]:
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    spoken = {"+": "plus", "-": "minus", "*": "times"}[kind]
    question = rng.choice(
        [f"What is {a} {kind} {b}?", f"{a} {kind} {b}", f"How much is {a} {spoken} {b}?", f"What is {a} {spoken} {b}?"]
    )
    return ask(question, f"{a} {kind} {b} = {result}.")


TOPICS: Topics = {word_meaning: 40, country: 8, element: 4, call: 10, sums: 5, reading: 6}
"""Of the first training."""

FACTS: Topics = {known_word: 45, unknown_word: 10, known_country: 14, element: 3, small_sum: 12}
"""Of the finishing stage: less, and more often, so that it is remembered."""
