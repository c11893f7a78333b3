"""Whether a grammar can be followed: tried where it may take too long, or end the process.

Compiling one can take for ever, or all memory, or run out of stack. Whoever passes here is compiled once more, with the
model's tokens, by the server itself.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from functools import cache

from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]
from llguidance import LLMatcher, LLTokenizer

from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.errors import ConstraintTooComplex, InvalidField, WarmKVError
from warmkv_server.text import grammars
from warmkv_server.text.message_grammar import source

SECONDS = 5.0
"""That a trial may take."""
_STACK_BYTES = 4 << 20
"""Half of what the server's own threads have, or less."""


@dataclass(frozen=True)
class Trial:
    """Work for a text process."""

    grammar: Grammar

    @property
    def characters(self) -> int:
        return self.grammar.characters

    @property
    def work(self) -> str:
        """For people."""
        return "preparing the response format"

    def refusal(self, why: str) -> WarmKVError:
        """The error for one that was stopped."""
        return ConstraintTooComplex(
            f"{self.work} {why}, and was stopped; give a simpler {self.grammar.field}", field=self.grammar.field
        )

    def run(self) -> None:
        """
        Raises:
            InvalidField, Unsupported, ConstraintTooComplex: if it can't be followed.
        """
        found: list[BaseException] = []

        def trying() -> None:
            try:
                _try(self.grammar)
            except BaseException as error:
                found.append(error)

        before = threading.stack_size(_STACK_BYTES)
        thread = threading.Thread(target=trying)
        thread.start()
        threading.stack_size(before)
        thread.join()
        if found:
            raise found[0]


def _try(grammar: Grammar) -> None:
    for part in dict.fromkeys(grammar.parts):  # by themselves first, so that a complaint names one of them
        _try(part)
    grammars.check_size(grammar)
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        _require_schema(grammar)
    matcher = LLMatcher(_bytes(), source(grammar), log_level=0, limits=grammars.LIMITS)
    follow_first(grammar, matcher)


def follow_first(grammar: Grammar, matcher: LLMatcher) -> None:
    """Refuse a grammar that is wrong, or where there is nothing to begin with.

    Raises:
        InvalidField, Unsupported, ConstraintTooComplex
    """
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        message = matcher.get_error()
        if message.startswith("NoExtension"):
            raise InvalidField.of(grammar.field, "no text is one of this form")
        raise grammars.complaint(grammar, message)


def _require_schema(grammar: Grammar) -> None:
    try:
        Draft202012Validator.check_schema(json.loads(grammar.texts[0]))
    except SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path)
        place = f" (at {where})" if where else ""
        raise InvalidField.of(grammar.field, f"is no JSON Schema: {error.message[:200]}{place}") from error
    except RecursionError as error:
        raise ConstraintTooComplex(f"{grammar.field} is too deep; give a simpler one", field=grammar.field) from error


@cache
def _bytes() -> LLTokenizer:
    """A vocabulary of the 256 bytes."""
    return LLTokenizer("byte")
