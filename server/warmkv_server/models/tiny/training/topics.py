"""Conversations made from collected facts: meanings of words, countries, elements, functions, sums, passages."""

from __future__ import annotations

import re
from random import Random

from .collect import Collection
from .facts import Country
from .grammar import Message
from .words import Word

_KNOWN_WORDS = 4_000
_KNOWN_COUNTRIES = frozenset(
    [
        "Argentina",
        "Australia",
        "Austria",
        "Belgium",
        "Brazil",
        "Bulgaria",
        "Canada",
        "Chile",
        "China",
        "Colombia",
        "Croatia",
        "Cuba",
        "Czechia",
        "Denmark",
        "Egypt",
        "Estonia",
        "Ethiopia",
        "Finland",
        "France",
        "Germany",
        "Greece",
        "Hungary",
        "Iceland",
        "India",
        "Indonesia",
        "Iran",
        "Iraq",
        "Ireland",
        "Israel",
        "Italy",
        "Jamaica",
        "Japan",
        "Jordan",
        "Kenya",
        "Latvia",
        "Lebanon",
        "Lithuania",
        "Luxembourg",
        "Malaysia",
        "Malta",
        "Mexico",
        "Mongolia",
        "Morocco",
        "Nepal",
        "Netherlands",
        "Nigeria",
        "Norway",
        "Pakistan",
        "Panama",
        "Peru",
        "Philippines",
        "Poland",
        "Portugal",
        "Romania",
        "Russia",
        "Serbia",
        "Singapore",
        "Slovakia",
        "Slovenia",
        "Spain",
        "Sweden",
        "Switzerland",
        "Syria",
        "Thailand",
        "Tunisia",
        "Ukraine",
        "Uruguay",
        "Venezuela",
        "Vietnam",
    ]
) | {"New Zealand", "South Africa", "South Korea", "North Korea", "United Kingdom", "United States", "Saudi Arabia"}


def ask(question: str, answer: str) -> list[Message]:
    """One turn of each side."""
    return [("user", question), ("assistant", answer)]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _a(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def common_word(data: Collection, rng: Random) -> Word:
    """A word, often a common one: the density falls with the square root of the rank."""
    return data.words[int(len(data.words) * rng.random() ** 2.5)]


def define(word: Word, rng: Random) -> list[Message]:
    """What a word means, sometimes with a question more."""
    name, meaning = word.word, word.meaning
    if len(meaning) > 90:
        meaning = meaning.split(";")[0]
    counted = word.part == "noun" and re.match(r"(a|an|any|one of|someone|a person) ", meaning)
    questions = [f"What does {name} mean?", f'What does "{name}" mean?', f"Define {name}.", f"Define the word {name}.",
                 f"What is the meaning of {name}?", f"Explain the word {name}."]  # fmt: skip
    if word.part == "noun":
        questions += [f"What is {_a(name) if counted else name}?"] * 8 + [
            f"Explain what {_a(name) if counted else name} is."
        ]
    answer = f'"{_capital(name)}" means {meaning}.'
    if counted:
        answer = f"{_capital(_a(name))} is {meaning}."
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
        choices.append(ask(question, f"For example: {_capital(rng.choice(examples))}."))
    if word.synonyms:
        question = rng.choice(
            ["Is there another word for it?", f"What is another word for {word.word}?", "Any synonyms?"]
        )
        choices.append(ask(question, f'Another word for it is "{word.synonyms[0]}".'))
    if word.opposites:
        question = rng.choice(["What is the opposite?", f"What is the opposite of {word.word}?"])
        choices.append(ask(question, f'The opposite is "{word.opposites[0]}".'))
    if word.kinds_of and word.part == "noun":
        question = rng.choice([f"What kind of thing is {_a(word.word)}?", "What kind of thing is that?"])
        choices.append(ask(question, f"It is a kind of {word.kinds_of[0]}."))
    return rng.choice(choices) if choices else []


def word_meaning(data: Collection, rng: Random) -> list[Message]:
    return define(common_word(data, rng), rng)


def country(data: Collection, rng: Random) -> list[Message]:
    return _about(rng.choice(data.countries), rng)


def _about(land: Country, rng: Random) -> list[Message]:
    name = land.name
    return rng.choice(
        [
            ask(rng.choice([f"What is the capital of {name}?", f"What's the capital of {name}?", f"Capital of {name}?",
                            f"Which city is the capital of {name}?"]),  # fmt: skip
                f"The capital of {name} is {land.capital}."),
            ask(f"{land.capital} is the capital of which country?", f"{land.capital} is the capital of {name}."),
            ask(rng.choice([f"Where is {name}?", f"On which continent is {name}?", f"In which part of the world is {name}?"]),
                f"{name} is in {land.continent}."),
            ask(rng.choice([f"What is the currency of {name}?", f"How do people pay in {name}?"]),
                f"The currency of {name} is the {land.currency}."),
            ask(rng.choice([f"Tell me about {name}.", f"What is {name}?", f"What do you know about {name}?"]),
                f"{name} is a country or territory in {land.continent}. Its capital is {land.capital}, "
                f"and people pay with the {land.currency}."),
        ]
    )  # fmt: skip


def element(data: Collection, rng: Random) -> list[Message]:
    item = rng.choice(data.elements)
    first = re.split(r"(?<=[a-z)])\. ", item.note)[0].rstrip(".") + "."
    return rng.choice(
        [
            ask(f"What is the symbol of {item.name}?", f"The symbol of {item.name} is {item.symbol}."),
            ask(f"Which element has the symbol {item.symbol}?", f"{item.symbol} is {item.name}."),
            ask(f"What is the atomic number of {item.name}?", f"The atomic number of {item.name} is {item.number}."),
            ask(rng.choice([f"Tell me about {item.name}.", f"What is {item.name}?"]),
                f"{_capital(item.name)} is the chemical element with the symbol {item.symbol} and the number {item.number}. {first}"),
        ]
    )  # fmt: skip


def call(data: Collection, rng: Random) -> list[Message]:
    item = rng.choice(data.calls)
    question = rng.choice(
        [
            f"What does {item.name} do?",
            f"What does {item.name} do in {item.manual}?",
            f"What is {item.name} for?",
            f"Explain {item.name}.",
            f"What is {item.name} in {item.manual}?",
        ]  # fmt: skip
    )
    return ask(question, f"{item.name} ({item.manual}): {_capital(item.does)}")


def sums(data: Collection, rng: Random) -> list[Message]:
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


def _sum(a: int, kind: str, b: int, rng: Random) -> list[Message]:
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    spoken = {"+": "plus", "-": "minus", "*": "times"}[kind]
    question = rng.choice(
        [f"What is {a} {kind} {b}?", f"{a} {kind} {b}", f"How much is {a} {spoken} {b}?", f"What is {a} {spoken} {b}?"]
    )
    return ask(question, f"{a} {kind} {b} = {result}.")


def passage(data: Collection, rng: Random, longest: int = 1500) -> str:
    """Whole paragraphs of a training document, at most ``longest`` characters unless the first is longer."""
    while True:
        document = rng.choice(data.documents)
        if document.held_out:
            continue
        paragraphs = [p.strip() for p in document.text.split("\n\n") if len(p) > 40]
        if not paragraphs:
            continue
        at = rng.randrange(len(paragraphs))
        text = paragraphs[at][:longest]
        for paragraph in paragraphs[at + 1 :]:
            if len(text) + len(paragraph) > longest:
                break
            text += "\n\n" + paragraph
        return text


def reading(data: Collection, rng: Random) -> list[Message]:
    """A passage, and a task that looks back at it."""
    text = passage(data, rng, rng.choice([300, 600, 1200]))
    sentences = [s for s in re.split(r"(?<=[a-z)\"'])[.!?:]\s+", text) if 20 < len(s) < 250]
    if not sentences:
        return reading(data, rng)
    first, last = sentences[0].strip(), sentences[-1].strip().rstrip(".")
    tasks = [
        (
            rng.choice(
                [
                    "Summarize this text in one sentence:",
                    "What is this about?",
                    "Give me the main point:",
                    "Sum up this text:",
                ]
            ),
            f"In short: {first}.",
        ),  # fmt: skip
        ("What is the first sentence of this text?", f"{first}."),
    ]
    if text.endswith((".", "!", "?")):
        tasks.append(("What is the last sentence of this text?", f"{last}."))
    task, answer = rng.choice(tasks)
    return ask(f"{task}\n\n{text}" if rng.random() < 0.5 else f"{text}\n\n{task}", answer)


def known_word(data: Collection, rng: Random) -> list[Message]:
    """One of the words that a model of this size can learn."""
    return define(rng.choice(data.words[:_KNOWN_WORDS]), rng)


def unknown_word(data: Collection, rng: Random) -> list[Message]:
    """A rare word, which the model had better not explain."""
    word = rng.choice(data.words[2 * _KNOWN_WORDS :]).word
    question = rng.choice([f"What is {_a(word)}?", f"What is {word}?", f"What does {word} mean?", f"Define {word}."])
    return ask(
        question, rng.choice([f'I don\'t know the word "{word}".', f'I am sorry, I don\'t know what "{word}" means.'])
    )


def known_country(data: Collection, rng: Random) -> list[Message]:
    """One of the countries that most people ask about."""
    return _about(rng.choice([land for land in data.countries if land.name in _KNOWN_COUNTRIES]), rng)


def small_sum(data: Collection, rng: Random) -> list[Message]:
    """Additions and subtractions up to 12."""
    del data
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    if rng.random() < 0.4:
        return _sum(max(a, b), "-", min(a, b), rng)
    return _sum(a, "+", b, rng)


TOPICS = {word_meaning: 40, country: 8, element: 4, call: 10, sums: 5, reading: 6}
"""Topics and how often each is drawn."""

FACTS = {known_word: 45, unknown_word: 10, known_country: 14, element: 3, small_sum: 12}
"""Topics of the finishing stage: less, and more often, so that it is remembered."""
