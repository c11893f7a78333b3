"""Whether the arguments of a call are what its tool takes: JSON Schema, with nothing fetched from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]
from referencing import Registry

from warmkv_server.contract.content import Tool
from warmkv_server.errors import InvalidField

_NOTHING: Registry[Any] = Registry()
_REMEMBERED = 256


def require_schemas(tools: Sequence[Tool]) -> None:
    """
    Raises:
        InvalidField: naming the first tool whose parameters are no JSON Schema.
    """
    for number, tool in enumerate(tools):
        if (wrong := _wrong(tool.parameters)) is not None:
            raise InvalidField.of(f"content.chat.tools.tools[{number}].parameters_json", f"is no JSON Schema: {wrong}")


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
