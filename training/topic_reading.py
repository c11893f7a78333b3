"""Passages of the training documents, and conversations that look back at them."""

from __future__ import annotations

import re
from random import Random

from .collect import Collection
from .grammar import Message, ask

_SUMMARIES = (
    "Summarize this text in one sentence:",
    "What is this about?",
    "Give me the main point:",
    "Sum up this text:",
)


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
        (rng.choice(_SUMMARIES), f"In short: {first}."),
        ("What is the first sentence of this text?", f"{first}."),
    ]
    if text.endswith((".", "!", "?")):
        tasks.append(("What is the last sentence of this text?", f"{last}."))
    task, answer = rng.choice(tasks)
    return ask(f"{task}\n\n{text}" if rng.random() < 0.5 else f"{text}\n\n{task}", answer)
