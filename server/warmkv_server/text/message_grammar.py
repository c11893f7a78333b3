"""The language of an answer that is read as a message, for llguidance: reasoning, calls and text.

Marks that are tokens of their own are named as such: no text has them in it. Other marks are text, and where a text may
be anything, it is anything without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from warmkv_server.contract.grammar import ID, NUMBER, Calls, CallSyntax, Grammar, GrammarKind, Message, Thought
from warmkv_server.text import grammars

Spell = Callable[[str], Sequence[str | int]]
"""Cuts a text into pieces of text, and tokens that are no text."""

_ANY = "/(?s:.*)/"
_IDS = {ID: "/[A-Za-z0-9]{9}/", NUMBER: "/[1-9][0-9]{0,2}/"}
_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, ('{"type": "object"}',))


def source(grammar: Grammar, spell: Spell = lambda text: [text]) -> str:
    """The grammar as llguidance takes it.

    Args:
        spell: of the vocabulary that it is for; by default all is text.

    Raises:
        InvalidField: for a schema that is no JSON.
    """
    return grammars.source(grammar) if grammar.message is None else _Writing(spell).of(grammar.message)


class _Writing:
    """One grammar as it is written: rules in Lark's notation, and grammars that they name."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._rules: list[str] = []
        self._named: dict[str, str] = {}
        self._no_text = ""

    def of(self, message: Message) -> str:
        thought = message.thought
        self._no_text = self._without(message.marks, thought.begin if thought is not None else "")
        ways = []
        if message.calls is not None:
            ways.append(f"space? {self._calls(message.calls)}")
        if message.speaks:
            ways += self._text(message)
        before = "" if thought is None else f"{self._thought(thought)} "
        rules = [f"start: {before}answer", f"answer: {' | '.join(ways)}", *self._rules, r"space: /[ \n]{1,8}/"]
        grammar = {"name": "message", "lark_grammar": "\n".join(rules)}
        named = [{**_only(text), "name": name} for text, name in self._named.items()]
        return json.dumps({"grammars": [grammar, *named]}, ensure_ascii=False)

    def _thought(self, thought: Thought) -> str:
        gap = self._exactly(thought.gap) or "space?"
        free = f"{self._up_to('thought', thought.end)} {gap}"
        if not thought.begin:
            return f"({free})"
        return f"(space? {self._exactly(thought.begin)} {free})?"

    def _text(self, message: Message) -> list[str]:
        """The ways in which the answer may be text."""
        says, said, calls = self._exactly(message.says), self._exactly(message.said), message.calls
        if message.text is not None:
            return [f"{says} {self._held(message.text)} {said}"]
        if message.bare:
            self._rules.append(rf"TEXT: /(\s*[^\s{{](?s:.*))?/{self._no_text}")
        else:
            self._rules.append(f"TEXT: {_ANY}{self._no_text}")
        ways = [f"{says} TEXT {said}"]
        if calls is not None and calls.mark and not says:
            behind = self._exactly(calls.syntax.opens.removeprefix(calls.mark))
            ways.append(f"{self._up_to('before', calls.mark, self._no_text)} {behind} called TEXT")
        return ways

    def _held(self, text: Grammar) -> str:
        """The text of a response format."""
        source = grammars.source(text)
        if text.kind not in (GrammarKind.REGEX, GrammarKind.CHOICES):
            return self._name(source)
        # As one rule, since the longest match is taken: it can't have in it what begins something else.
        self._rules.append(f"HELD: {str(_only(source)['lark_grammar']).removeprefix('start: ')}{self._no_text}")
        return "HELD"

    def _calls(self, calls: Calls) -> str:
        syntax = calls.syntax
        further = ""
        if syntax.again and calls.most != 1:
            self._rules.append(f"further: {self._exactly(syntax.again)} ({self._one_of(calls, syntax.middle_again)})")
            further = f"further{{0,{calls.most - 1}}}" if calls.most else "further*"
        closes = "" if syntax.unread else self._exactly(syntax.closes)
        self._rules.append(f"called: call {further} {closes}")
        self._rules.append(f"call: {self._one_of(calls, syntax.middle)}")
        if syntax.unread:
            self._rules.append(f"unread: {self._unread(syntax)}")
        return f"{self._exactly(syntax.opens)} called"

    def _one_of(self, calls: Calls, middle: str) -> str:
        ways = []
        for name, schema in calls.tools:
            arguments = "unread" if calls.syntax.unread else self._name(grammars.source(schema or _OBJECT))
            ways.append(f"{self._exactly(name + middle)} {arguments}")
        return " | ".join(ways)

    def _unread(self, syntax: CallSyntax) -> str:
        """Arguments that are no JSON, and what ends them; tokens that are no text are those that some have had."""
        inner = self._without([syntax.inner] if syntax.inner else [])
        pieces = self._spell(syntax.unread)
        marks = dict.fromkeys(f"<[{piece}]>" for piece in pieces if isinstance(piece, int))
        if not marks or isinstance(self._spell(syntax.closes)[0], str):
            # What begins with a mark must have it, or it would go on with the name.
            begin = "" if syntax.middle else _quoted(syntax.unread.partition(">")[0] + ">")
            return self._up_to("arguments", syntax.closes, inner, f"/({begin}(?s:.*))?/" if begin else _ANY)
        self._rules.append(f"ARGUMENTS: {_ANY}{inner}")
        end, more = self._exactly(syntax.closes), f"(({' | '.join(marks)}) ARGUMENTS?)*"
        return f"ARGUMENTS? {more} {end}" if syntax.middle else f"({next(iter(marks))} ARGUMENTS? {more})? {end}"

    def _name(self, source: str) -> str:
        return f"@{self._named.setdefault(source, f'part{len(self._named)}')}"

    def _up_to(self, name: str, mark: str, without: str = "", anything: str = _ANY) -> str:
        """Anything up to a mark, and the mark."""
        first, *rest = self._spell(mark)
        free = f"{name.upper()}_FREE"
        self._rules.append(f"{free}: {anything}{without}")
        if isinstance(first, int):
            return f"{free} {self._pieces([first, *rest])}"
        self._rules.append(f"{name}_end[lazy]: {free} {self._pieces([first])}")
        return f"{name}_end {self._pieces(rest)}"

    def _without(self, marks: Sequence[str], begin: str = "") -> str:
        """And none of the marks that are text, nor one at the beginning."""
        texts = {piece for mark in marks if isinstance(piece := self._spell(mark)[0], str)}
        least = sorted(text for text in texts if not any(other in text for other in texts - {text}))
        parts = [f"(?s:.*)({'|'.join(map(_quoted, least))})"] if least else []
        if begin and isinstance(first := self._spell(begin)[0], str):
            parts.append(rf"\s*{_quoted(first)}")
        return f" & ~/({'|'.join(parts)})(?s:.*)/" if parts else ""

    def _exactly(self, text: str) -> str:
        return self._pieces(self._spell(text)) if text else ""

    def _pieces(self, pieces: Sequence[str | int]) -> str:
        written = []
        for piece in pieces:
            parts = [piece] if isinstance(piece, int) else re.split(f"([{ID}{NUMBER}])", piece)
            for part in parts:
                if isinstance(part, int):
                    written.append(f"<[{part}]>")
                elif part:
                    written.append(_IDS.get(part) or json.dumps(part, ensure_ascii=False))
        return " ".join(written)


def _only(source: str) -> dict[str, Any]:
    """The one grammar that there is, as llguidance's functions write it or a client."""
    if not source.startswith("{"):
        return {"lark_grammar": source}
    (grammar,) = json.loads(source)["grammars"]
    return dict(grammar)


def _quoted(text: str) -> str:
    """As an expression for it."""
    return re.sub(r"[][\\.+*?()|{}^$#&~/-]", r"\\\g<0>", text)
