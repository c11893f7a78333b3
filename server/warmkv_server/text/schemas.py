"""Whether the arguments of a call are what its tool takes: JSON Schema, with nothing fetched from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]
from referencing import Registry

from warmkv_server.contract.content import Tool
from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.errors import InvalidField, Unsupported
from warmkv_server.text.traits import Traits

_NOTHING: Registry[Any] = Registry()
_REMEMBERED = 256
_NO_ARGUMENTS: dict[str, Any] = {"properties": {}, "additionalProperties": False}


def require_schemas(tools: Sequence[Tool]) -> None:
    """
    Raises:
        InvalidField: naming the first tool whose parameters are no JSON Schema.
    """
    for number, tool in enumerate(tools):
        if (wrong := _wrong(tool.parameters)) is not None:
            raise InvalidField.of(f"content.chat.tools.tools[{number}].parameters_json", f"is no JSON Schema: {wrong}")


def require_strict(tools: Mapping[int, Tool], traits: Traits) -> None:
    """
    Args:
        tools: by their numbers in their request.

    Raises:
        Unsupported: naming the first strict tool, if the arguments of this model's calls can't be held to a schema.
    """
    strict = next((number for number, tool in tools.items() if tool.strict), None)
    if strict is None or (traits.syntax is not None and not traits.syntax.unread):
        return
    form = traits.form.name if traits.form is not None else "unknown"
    field = f"content.chat.tools.tools[{strict}].strict"
    raise Unsupported(
        f"{field}: arguments as this model writes them ({form}) can't be held to a "
        "schema; leave it out: a call's status says whether its arguments satisfy it",
        field=field,
    )


def strict_grammar(tool: Tool, number: int) -> Grammar:
    """What the arguments of a strict tool are held to: an object, as the schema says.

    Args:
        number: of the tool in its request.
    """
    schema = json.loads(tool.parameters) if tool.parameters else _NO_ARGUMENTS
    wanted = schema.get("type", "object")
    place = f"content.chat.tools.tools[{number}].parameters_json"
    if "object" not in (wanted if isinstance(wanted, list) else [wanted]):
        raise InvalidField.of(place, "must be of objects, for a strict tool")
    text = json.dumps({**schema, "type": "object"}, ensure_ascii=False)
    return Grammar(GrammarKind.JSON_SCHEMA, (text,), place)


def satisfies(schema: str, arguments: str) -> bool:
    """Whether arguments satisfy a schema; not, where the schema can't be applied to them."""
    try:
        return bool(_validator(schema).is_valid(json.loads(arguments)))
    except MemoryError:
        raise
    except Exception:  # a reference that leads nowhere, a pattern that is none, or too deep
        return False


@lru_cache(_REMEMBERED)
def _wrong(schema: str) -> str | None:
    try:
        Draft202012Validator.check_schema(json.loads(schema or "{}"))
    except SchemaError as error:
        return str(error.message)[:200]
    except RecursionError:
        return "it is too deep"
    return None


@lru_cache(_REMEMBERED)
def _validator(schema: str) -> Any:
    return Draft202012Validator(json.loads(schema or "{}"), registry=_NOTHING)
