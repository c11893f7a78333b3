"""The functions of a Python file as tools: what a model is told of them, and calling them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import to_json

from warmkv_server.errors import OperatorError

MOST_CHARACTERS = 100_000
"""Of a result; what is longer is cut, and says so."""
_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
_MODULE = "warmkv_chat_tools"
_OF_PARAMETERS = ("Args", "Arguments", "Parameters")
_SECTION = re.compile(rf"({'|'.join(_OF_PARAMETERS)}|Returns|Yields|Raises|Examples?|Notes?):\s*$")
_PARAMETER = re.compile(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")
_FIELD = re.compile(r":param\s+(?:[^:]*\s)?(\w+):\s*(.*)$")
_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Function:
    """One that a model may call.

    Attributes:
        parameters: JSON Schema of its arguments.
        calls: takes the arguments by name, as JSON has them.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    calls: Callable[..., Any]

    def call(self, arguments: str) -> str:
        """What comes of it, as the model is told it: a text as it is, anything else as JSON, or what went wrong.

        Args:
            arguments: a JSON object.
        """
        said = self._outcome(arguments).encode("utf-8", "replace").decode()  # names of files can be no Unicode
        if len(said) > MOST_CHARACTERS:
            return f"{said[:MOST_CHARACTERS]}\n(cut here: it has {len(said)} characters)"
        return said

    def _outcome(self, arguments: str) -> str:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
                found = self.calls(**json.loads(arguments))
                if inspect.isawaitable(found):
                    found = asyncio.run(_awaited(found))
            return found if isinstance(found, str) else to_json(found, fallback=str).decode()
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            return f"error: the arguments are wrong: {'; '.join(wrong)}"
        except KeyboardInterrupt:
            return "error: the user stopped it"
        except (Exception, SystemExit) as error:  # whatever a function raises
            return f"error: {type(error).__name__}: {error}"


def read(path: Path) -> dict[str, Function]:
    """The functions that the file defines and whose names don't begin with `_`, by name.

    Raises:
        OperatorError: there are none, or one can't be described to a model.
    """
    module = _run(path)
    found = [
        each
        for name, each in vars(module).items()
        if inspect.isfunction(each) and each.__module__ == _MODULE and not name.startswith("_")
    ]
    if not found:
        raise OperatorError(f"--tools {path} defines no function whose name doesn't begin with _; define one")
    return {each.__name__: _described(path, each) for each in found}


async def _awaited(found: Any) -> Any:
    return await found


def _run(path: Path) -> ModuleType:
    """The file as a module, whose neighbours it can import."""
    if not path.is_file():
        raise OperatorError(f"--tools {path} is not a file; give one with functions in Python")
    spec = importlib.util.spec_from_file_location(_MODULE, path.absolute())
    if spec is None or spec.loader is None:
        raise OperatorError(f"--tools {path} is not Python; give a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # where type hints are looked up
    sys.path.append(str(path.absolute().parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file raises
        line = _line_of(error, path)
        raise OperatorError(
            f"--tools {path} can't be run{line}: {type(error).__name__}: {' '.join(str(error).split())}; mend it"
        ) from error
    return module


def _line_of(error: BaseException, path: Path) -> str:
    """The last place in the file that an error came through."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f", line {error.lineno}"
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.absolute()):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""


def _described(path: Path, function: Callable[..., Any]) -> Function:
    """
    Raises:
        OperatorError: it can't be.
    """
    name = function.__name__
    where = f"--tools {path}: {name}"
    if not _NAME.fullmatch(name):
        raise OperatorError(f"{where} has a name that no tool can have; take up to 64 of A-Z a-z 0-9 _")
    description, of_parameters = _docstring(function)
    if not description:
        raise OperatorError(
            f"{where} has no docstring, which would tell the model what it does; give it one, or a name that begins "
            "with _"
        )
    try:
        hints = get_type_hints(function)
    except Exception as error:  # whatever is wrong with a name in a hint
        raise OperatorError(f"{where} has type hints that can't be read: {error}; mend them") from error
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in _NAMED_KINDS:
            raise OperatorError(f"{where} takes {parameter}, and a model gives arguments by name; name each of them")
        if parameter.name not in hints:
            raise OperatorError(f"{where} has no type hint for {parameter.name}; give it one, such as `str`")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]
        schema = _bare(adapter.json_schema())
        calls = validate_call(config=ConfigDict(arbitrary_types_allowed=False))(function)
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticUserError) as error:
        why = str(error).splitlines()[0]
        raise OperatorError(f"{where} takes what JSON can't say: {why}; take types that JSON has") from error
    for parameter_name, said in of_parameters.items():
        if parameter_name in schema.get("properties", {}):
            schema["properties"][parameter_name].setdefault("description", said)
    return Function(name, description, schema, calls)


def _bare(schema: Any) -> Any:
    """A schema without the titles that pydantic makes of the names: tokens that say nothing."""
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    names = ("properties", "$defs")
    return {
        key: {name: _bare(each) for name, each in value.items()} if key in names else _bare(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of its parameters: under `Args:`, or behind `:param NAME:`."""
    said: list[str] = []
    about: list[str] = []
    into: list[str] | None = said
    for line in (inspect.getdoc(function) or "").splitlines():
        if found := _FIELD.match(line):
            into = about
            into.append(f"{found[1]}: {found[2]}")
        elif line.startswith(":"):
            into = None
        elif found := _SECTION.match(line):
            into = about if found[1] in _OF_PARAMETERS else None
        elif into is not None:
            into.append(line)
    parameters: dict[str, str] = {}
    last = ""
    for line in textwrap.dedent("\n".join(about)).splitlines():
        if found := _PARAMETER.match(line):
            last = found[1]
            parameters[last] = found[2]
        elif last and line.strip():
            parameters[last] += f" {line.strip()}"
    return "\n".join(said).strip(), {name: " ".join(text.split()) for name, text in parameters.items()}
