"""The settings on the command line: a flag for each, and `warmkv config`, which says what they come to."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from warmkv_server import config
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import OperatorError

settings = typer.Typer(help="What `warmkv serve` would be set to.", no_args_is_help=True)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each setting, with the setting's help and default, and `--config`.

    The command gets those that were given, by name, besides its own parameters.
    """
    file = typer.Option(
        "--config",
        help=f"Settings in TOML, under the environment and flags; or {config.FILE_VARIABLE}.",
        metavar="FILE",
    )
    own = [
        each
        for each in inspect.signature(command, eval_str=True).parameters.values()
        if each.kind is not each.VAR_KEYWORD
    ]
    parameters = [_parameter("config", Annotated[Path | None, file])]
    for option in config.options():
        flag = typer.Option(
            option.flag,
            help=option.help,
            show_default=option.default if option.default and not option.is_switch else False,
            metavar=None if option.is_switch else option.metavar,
        )
        kind: Any = bool | None if option.is_switch else str | None
        parameters.append(_parameter(option.name, Annotated[kind, flag]))
    command.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    return command


def told_by(flags: dict[str, Any]) -> config.Configured:
    """The settings that a command with flags was given.

    Raises:
        OperatorError
    """
    file = flags.pop("config", None)
    return config.tell({name: value for name, value in flags.items() if value is not None}, file)


@settings.callback()
def _settings() -> None:
    """What `warmkv serve` would be set to."""


@settings.command("show")
@with_flags
def show(
    *, as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False, **flags: Any
) -> None:
    """Say each setting's value, and where it came from: a flag, the environment, the file, or the default."""
    try:
        told = told_by(flags)
    except OperatorError as error:
        typer.echo(f"warmkv: {error}", err=True)
        raise typer.Exit(2) from None
    values = {option.name: _plain(told.settings, option.name) for option in config.options()}
    if as_json:
        found = {name: {"value": value, "from": told.origins[name]} for name, value in values.items()}
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    texts = {name: "" if value is None else str(value) for name, value in values.items()}
    names, widest = max(map(len, texts)), max(map(len, texts.values()))
    for name, text in texts.items():
        typer.echo(f"{name:<{names}}  {text:<{widest}}  {told.origins[name]}")


def _plain(told: Settings, name: str) -> Any:
    value = getattr(told, name)
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
