"""Whole conversations: scenes and topics in a row, a system text now and then, and facts asked for much later."""

from __future__ import annotations

from pathlib import Path
from random import Random

from .collect import Collection
from .grammar import Grammar, Message, Table, ask, read_grammar
from .topic_reading import passage
from .topics import FACTS, TOPICS, Topics

_TEXTS = Path(__file__).parent / "texts"
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the user's questions.",
    "You are an assistant that runs on WarmKV.",
    "You are a careful agent. Use what the user told you.",
    "Be kind and helpful.",
    "You are the built-in model of WarmKV.",
)
_SCENE_SHARE = 0.55  # of a conversation's parts; the others come from TOPICS
_STORY_SHARE = 0.2  # of the scenes


class Talks:
    """Conversations drawn at random; the same generator gives the same conversations."""

    def __init__(self, data: Collection) -> None:
        self._data = data
        self.grammar = read_grammar(sorted(_TEXTS.glob("*.txt")))
        _widen(self.grammar, data)
        scenes = [scene for file in self.grammar.scenes.values() for scene in file]
        stories = self.grammar.scenes["stories"]
        self._told = [scene for scene in self.grammar.scenes["memory"] if len(scene.turns) > 1]
        weight = _STORY_SHARE / (1 - _STORY_SHARE) * len(scenes) / len(stories)
        self._scenes = scenes + stories
        self._weights = [1.0 + len(s.system) + len(s.turns) for s in scenes] + [weight] * len(stories)

    def short(self, rng: Random) -> list[Message]:
        """One conversation of one to eight parts."""
        return self._talk(TOPICS, rng)

    def facts(self, rng: Random) -> list[Message]:
        """The same, about fewer things."""
        return self._talk(FACTS, rng)

    def _talk(self, topics: Topics, rng: Random) -> list[Message]:
        said: list[Message] = []
        parts = rng.choice([1, 1, 1, 1, 2, 2, 3, 4, 6, 8])
        for _ in range(parts):
            said += self._part(topics, rng, first=not said)
        if said[0][0] != "system" and rng.random() < 0.3:
            said.insert(0, ("system", rng.choice(_SYSTEMS)))
        return [(role, _as_typed(text, rng) if role == "user" else text) for role, text in said]

    def _part(self, topics: Topics, rng: Random, first: bool) -> list[Message]:
        if rng.random() < _SCENE_SHARE:
            (scene,) = rng.choices(self._scenes, self._weights)
            if scene.system and not first:
                return self._part(topics, rng, first)
            said = self.grammar.play(scene, rng)
            turns = 2 * rng.randint(1, len(scene.turns)) + bool(scene.system)
            return said[:turns]
        (topic,) = rng.choices(list(topics), list(topics.values()))
        return topic(self._data, rng)

    def long(self, rng: Random, characters: int) -> list[Message]:
        """A conversation of about ``characters``, in which things told at any point are asked for at any later one."""
        told = rng.sample(self._told, k=min(len(self._told), rng.randint(2, 8)))
        open_turns = [self.grammar.play(scene, rng) for scene in told]
        said: list[Message] = [("system", rng.choice(_SYSTEMS))] if rng.random() < 0.5 else []
        size = 0
        waiting: list[list[Message]] = []  # turns that ask back, of what was told already
        while size < characters or open_turns:
            before = len(said)
            if open_turns and (rng.random() < 0.3 or size >= characters):
                turns = open_turns.pop()
                said += turns[:2]
                waiting.append(turns[2:])
            elif waiting and rng.random() < 0.15:
                said += waiting.pop(rng.randrange(len(waiting)))
            elif rng.random() < 0.35:
                text = passage(self._data, rng, rng.choice([800, 2000, 4000]))
                said += ask(
                    _handed_over(text, rng), rng.choice(["Thank you, I have read it.", "I have read it.", "All right."])
                )
            else:
                said += self._part(TOPICS, rng, first=False)
            size += sum(len(text) for _, text in said[before:])
        rng.shuffle(waiting)
        for turns in waiting:
            said += turns
        return said

    def needles(self, rng: Random, characters: int) -> list[Message]:
        """One long text with notes in it, then questions about the notes."""
        scenes = [self.grammar.play(scene, rng) for scene in rng.sample(self._told, k=rng.randint(1, 5))]
        parts: list[str] = []
        while sum(map(len, parts)) < characters:
            parts.append(passage(self._data, rng, 4000))
        for scene in scenes:
            parts.insert(rng.randrange(len(parts) + 1), scene[0][1])
        said = ask("\n\n".join(parts), rng.choice(["Thank you, I have read it.", "I have read all of it."]))
        for scene in scenes:
            said += scene[2:]
        return said


def _handed_over(text: str, rng: Random) -> str:
    return rng.choice(["Here is a text for later:\n\n", "Please read this:\n\n", "Keep this in mind:\n\n", ""]) + text


def _as_typed(text: str, rng: Random) -> str:
    """Now and then without capitals or the closing mark, as people type."""
    if len(text) < 120:
        chance = rng.random()
        if chance < 0.10:
            text = text.lower()
        elif chance < 0.20:
            text = text[0].lower() + text[1:]
        if rng.random() < 0.2:
            text = text.rstrip(".!?")
        if rng.random() < 0.05 and text[:2] != "I ":
            text = rng.choice(["Please, ", "Hey, ", "Well, ", "So, ", "And ", "OK. "]) + text[0].lower() + text[1:]
    return text


def _widen(grammar: Grammar, data: Collection) -> None:
    """Add names and numbers that mean nothing, so that the model learns to copy what it has never seen."""
    rng, tables = Random("names"), grammar.tables
    heads, tails = ([row[0] for row in tables[part].rows] for part in ("name_head", "name_tail"))
    made = ["".join([rng.choice(heads), *rng.sample(tails, rng.randint(1, 2))]) for _ in range(600)]
    tables["name"].rows += [[name] for name in made[:400]]
    tables["petname"].rows += [[name] for name in made[400:]]
    tables["digits"].rows += [[str(rng.randint(10, 9999))] for _ in range(500)]
    counted = [word.word for word in data.words if word.part == "noun" and word.meaning.startswith(("a ", "an "))]
    nouns = [noun for noun in counted if " " not in noun]
    drawn = rng.sample(nouns, min(1500, len(nouns)))
    tables["item"] = Table(["item"], tables["thing"].rows + [[noun] for noun in drawn])
