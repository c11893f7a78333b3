"""What an answer is held to: the language of its text, as a client says it, and what stands around it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GrammarKind(StrEnum):
    """Named as the fields of ResponseFormat."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    CHOICES = "choices"
    GBNF = "gbnf"
    """What other servers take for a grammar; no field of ResponseFormat."""
    MESSAGE = "message"
    """An answer that is read as a message."""


RESPONSE_FORMATS = (GrammarKind.JSON_SCHEMA, GrammarKind.REGEX, GrammarKind.LARK, GrammarKind.CHOICES)


@dataclass(frozen=True)
class Grammar:
    """A language that the answer is a sentence of.

    Attributes:
        texts: the schema, expression or grammar; or the choices.
        place: in a request; empty for that of a response format.
        message: of kind MESSAGE, and of no other.
    """

    kind: GrammarKind
    texts: tuple[str, ...] = ()
    place: str = ""
    message: Message | None = None

    @property
    def field(self) -> str:
        """Its place in a request."""
        return self.place or f"response_format.{self.kind}"

    @property
    def parts(self) -> tuple[Grammar, ...]:
        """The grammars that a message has in it."""
        if self.message is None:
            return ()
        calls = self.message.calls
        schemas = tuple(each for _, each in calls.tools if each is not None) if calls is not None else ()
        return (*schemas, self.message.text) if self.message.text is not None else schemas

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts)) + sum(part.characters for part in self.parts)


@dataclass(frozen=True)
class CallSyntax:
    """What a model writes around the names and the arguments of its calls, as its chat template does.

    `ID` in one of them stands for an id, and `NUMBER` for the number of a call behind the first.

    Attributes:
        opens: before the first name.
        middle: between that and its arguments.
        again, middle_again: the same of further calls, from the arguments before; empty where an answer has one call.
        closes: behind the last arguments.
        unread: some arguments, where they are no JSON, so that they can't be told from what stands around them.
        inner: what such a call has before its name, and no argument.
    """

    opens: str
    middle: str
    again: str = ""
    middle_again: str = ""
    closes: str = ""
    unread: str = ""
    inner: str = ""


ID, NUMBER = "\0", "\1"


@dataclass(frozen=True)
class Thought:
    """Reasoning that may come first.

    Attributes:
        begin: the mark before it; empty where the prompt has it.
        end: the mark behind it.
        gap: what stands between that and the rest of the answer; empty for white space.
    """

    begin: str
    end: str
    gap: str = ""


@dataclass(frozen=True)
class Calls:
    """Calls that may be in an answer.

    Attributes:
        tools: names, and what the arguments have to be; None for any JSON object.
        most: of them; 0 for as many as there may be.
        mark: what they begin with and no text has; empty if there is nothing.
    """

    syntax: CallSyntax
    tools: tuple[tuple[str, Grammar | None], ...]
    most: int = 0
    mark: str = ""


@dataclass(frozen=True)
class Message:
    """An answer: reasoning, and then calls, or text and perhaps calls behind it.

    Attributes:
        speaks: whether there may be text.
        text: what that has to be; None for anything without the marks.
        marks: what begins a call.
        bare: whether an object that begins the text is taken for a call.
        says, said: what the model writes before and behind its text.
    """

    thought: Thought | None = None
    calls: Calls | None = None
    speaks: bool = True
    text: Grammar | None = None
    marks: tuple[str, ...] = ()
    bare: bool = False
    says: str = ""
    said: str = ""
