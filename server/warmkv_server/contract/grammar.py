"""What an answer's text is constrained to, as a client says it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GrammarKind(StrEnum):
    """Named as the fields of ResponseFormat."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    CHOICES = "choices"


@dataclass(frozen=True)
class Grammar:
    """A language that the answer is a sentence of.

    Attributes:
        texts: the schema, expression or grammar; or the choices.
    """

    kind: GrammarKind
    texts: tuple[str, ...]

    @property
    def field(self) -> str:
        """Its place in a request."""
        return f"response_format.{self.kind}"

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))
