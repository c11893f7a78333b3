"""From what a client says of an answer's text to a grammar of llguidance, and from its complaints to errors.

llguidance (M. Moskal and others, MIT) compiles a grammar lazily and says for each token of a vocabulary whether the
text can still become a sentence behind it. What it takes for one token is bounded by `LIMITS`. What compiling takes is
not, and some grammars end the process: see trial.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.errors import ConstraintTooComplex, InvalidField, Unsupported, WarmKVError

PROPERTIES = 2_000
"""In all objects of a schema."""
ALTERNATIVES = 5_000
"""Entries of enum, anyOf, oneOf and allOf in a schema; lines and alternatives of a Lark grammar."""
DEPTH = 100
"""Levels of a schema. llguidance and JSON's readers take a few more."""

LIMITS = LLParserLimits(
    max_items_in_row=400,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=500_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
"""For one token: measured on 2 cores, the worst grammars found take some 10 ms before they run out, ambiguous ones 60.
States take up to 2 kB each. With llguidance's own limits a token took more than a second."""

_JSON = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    # Nothing at all makes small models worse, and without an end they sometimes write nothing else.
    "whitespace_pattern": r"[ \n]{1,8}",
    "coerce_one_of": False,
    "lenient": False,
    # One spelling for each name: with others a second value for a property escapes what the schema says of it.
    "json_allowed_escapes": '"\\bfnrt',
}

_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DATE = (
    f"{_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|([0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29"
)
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_HOUR})"
MOMENTS = {"date": _DATE, "time": _TIME, "date-time": f"({_DATE})T{_TIME}"}
"""Formats of dates that there are, and of times without leap seconds: whether one was can't be seen by its form."""

_DATA = ("const", "enum", "default", "examples")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_METASCHEMAS = ("http://json-schema.org", "https://json-schema.org")
"""Documents that llguidance has, and follows in part."""
_LISTED = ("anyOf", "oneOf", "allOf", "enum")
_SPELLED = "\b\f\n\r\t"
"""The control characters that have an escape of their own."""

_MUCH = (
    "too big",
    "too large",
    "too many",
    "too complex",
    "too deep",
    "recursion limit",
    "limit for",
    "fuel",
    "max is",
)
_RANGE = "minimum, maximum, exclusiveMinimum or exclusiveMaximum"
_COMPLAINTS = {
    "Unknown format": "format",
    "oneOf constraints": "oneOf",
    "circular references": "$ref",
    "Resource '": "$ref",
    "min/maxProperties": "minProperties or maxProperties",
    "patternProperty": "patternProperties",
    "integer range": _RANGE,
    "number range": _RANGE,
    "multipleOf": "multipleOf",
    "float range": _RANGE,
    "regex": "pattern",
}
_CHARACTERS = 200


def source(grammar: Grammar) -> str:
    """The grammar as llguidance takes it.

    Raises:
        InvalidField: for a schema that is no JSON, and a grammar that can't be read.
    """
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            try:
                return LLMatcher.grammar_from_json_schema(_as_followed(grammar.texts[0]), overrides=_JSON)  # type: ignore[arg-type]
            except ValueError as error:
                raise InvalidField.of(grammar.field, f"is no JSON: {_short(str(error))}") from error
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.texts[0])
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.texts[0])
        case GrammarKind.GBNF:
            try:
                return LLMatcher.grammar_from_lark(any_to_lark(grammar.texts[0]))
            except Exception as error:  # nothing less is what it raises where there is no rule to begin with
                raise InvalidField.of(grammar.field, f"can't be read: {_short(str(error))}") from error
        case GrammarKind.CHOICES:
            return LLMatcher.grammar_from_regex(
                "|".join(re.sub(r"[][\\.+*?()|{}^$#&~-]", r"\\\g<0>", t) for t in grammar.texts)
            )
        case GrammarKind.MESSAGE:
            raise ValueError("a message is more than one grammar")


def complaint(grammar: Grammar, message: str) -> WarmKVError:
    """What llguidance says of a grammar, as the error that the client gets."""
    short = _short(message)
    if message.startswith("panic") or any(word in message for word in _MUCH):
        # It panics where it counts further than it can; what it says then is for its makers.
        why = "" if message.startswith("panic") else f" ({short})"
        return ConstraintTooComplex(
            f"{grammar.field} takes too much to follow{why}; give a simpler one", field=grammar.field
        )
    looks = "look-around" in message or "backreference" in message
    if grammar.kind is not GrammarKind.JSON_SCHEMA:
        return (
            Unsupported(f"{grammar.field}: {short}", field=grammar.field)
            if looks
            else InvalidField.of(grammar.field, short)
        )
    if keys := re.search(r"Unimplemented keys: \[(.*?)\]", message):
        return unsupported(grammar, keys[1].replace('"', ""))
    if "Unsatisfiable" in message or "does not exist" in message or ("regex parse error" in message and not looks):
        return InvalidField.of(grammar.field, short)
    keyword = next((name for words, name in _COMPLAINTS.items() if words in message), "")
    return unsupported(grammar, keyword, short)


def unsupported(grammar: Grammar, keyword: str, why: str = "") -> Unsupported:
    """A schema has a keyword that can't be enforced."""
    said = f" ({why})" if why else ""
    what = f"the keyword {keyword}" if keyword else "what it says"
    return Unsupported(
        f"{grammar.field}: this server can't enforce {what}{said}; leave it out and check it yourself",
        field=grammar.field,
    )


def check_size(grammar: Grammar) -> None:
    """Refuse what has more parts than are taken, and schemas that llguidance would follow in another sense.

    Raises:
        ConstraintTooComplex, InvalidField, Unsupported
    """
    if grammar.kind in (GrammarKind.LARK, GrammarKind.GBNF):
        parts = sum(text.count("\n") + text.count("|") for text in grammar.texts)
        _require(grammar, parts, ALTERNATIVES, "lines and alternatives")
    if grammar.kind is not GrammarKind.JSON_SCHEMA:
        return
    properties = alternatives = 0
    for key, value in _keywords(grammar):
        if key == "$ref" and isinstance(value, str) and value.startswith(_METASCHEMAS):
            raise unsupported(grammar, "$ref", "to another document")
        properties += len(value) if key == "properties" and isinstance(value, dict) else 0
        alternatives += len(value) if key in _LISTED and isinstance(value, list) else 0
        if key == "multipleOf" and isinstance(value, float) and not value.is_integer():
            raise unsupported(grammar, "multipleOf", "with a value that isn't whole, validators differ")
        if key in ("const", "enum") and not _can_be_spelled(value):
            raise unsupported(grammar, key, "with control characters")
    _require(grammar, properties, PROPERTIES, "properties")
    _require(grammar, alternatives, ALTERNATIVES, "alternatives")


def _keywords(grammar: Grammar) -> Iterator[tuple[str, Any]]:
    """Every keyword of every schema in the schema, with its value."""
    try:
        whole = json.loads(grammar.texts[0])
    except (ValueError, RecursionError) as error:
        raise InvalidField.of(grammar.field, f"is no JSON: {_short(str(error))}") from error
    for part, level in _parts(whole):
        _require(grammar, level, DEPTH, "levels")
        if isinstance(part, dict):
            yield from part.items()


def _parts(whole: Any) -> Iterator[tuple[Any, int]]:
    """Every schema in a schema, and every list of some, with its level."""
    waiting = [(whole, False, 1)]
    while waiting:
        part, named, level = waiting.pop()
        yield {} if named else part, level
        if isinstance(part, list):
            waiting += [(each, False, level + 1) for each in part]
        elif isinstance(part, dict) and named:
            waiting += [(each, False, level + 1) for each in part.values()]
        elif isinstance(part, dict):
            waiting += [(each, key in _MAPS, level + 1) for key, each in part.items() if key not in _DATA]


def _require(grammar: Grammar, count: int, most: int, what: str) -> None:
    if count > most:
        raise ConstraintTooComplex(
            f"{grammar.field} has more than {most} {what}; give a smaller one",
            field=grammar.field,
            limit=most,
            unit=what,
        )


def _as_followed(schema: str) -> str:
    """The schema as llguidance follows it in our sense: as one of 2020-12, whatever `$schema` says, with real dates."""
    found = json.loads(schema)
    if isinstance(found, bool):
        return "{}" if found else '{"allOf": [false]}'
    if not isinstance(found, dict):
        return schema
    changed = {key: value for key, value in found.items() if key != "$schema"}
    dicts = [part for part, _ in _parts(changed) if isinstance(part, dict)]
    dated = [part for part in dicts if isinstance(part.get("format"), str) and part["format"] in MOMENTS]
    if changed == found and not dated:
        return schema
    for part in dated:
        pattern = {"pattern": f"^({MOMENTS[part.pop('format')]})$"}
        if "pattern" in part:
            part["allOf"] = [*part.get("allOf", ()), pattern]
        else:
            part |= pattern
    return json.dumps(changed, ensure_ascii=False)


def _can_be_spelled(value: Any) -> bool:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and any(letter < " " and letter not in _SPELLED for letter in part):
            return False
    return True


def _short(message: str) -> str:
    """In one line, and without what can be said of the inside."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= _CHARACTERS else f"{line[: _CHARACTERS - 1]}…"
