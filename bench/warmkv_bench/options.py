"""Options of the command line that several commands share, and how their text becomes values."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypeVar

import typer

from warmkv_bench.config import ConfigError
from warmkv_bench.target import Target, running_target, spawned_target

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

TargetOption = Annotated[
    str | None, typer.Option("--target", metavar="HOST:PORT", help="A running server, that nobody else is using.")
]
SpawnOption = Annotated[
    bool, typer.Option("--spawn", help="Start a server on a temporary data directory (the default without --target).")
]
ModelOption = Annotated[str, typer.Option("--model", help="What the started server serves: its own --model.")]
ServerArgsOption = Annotated[
    str, typer.Option("--server-args", metavar="'...'", help="Further arguments for `warmkv serve`, as one string.")
]
USAGE = 2
DEFAULT_MODEL = "builtin:tiny"


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """Which server to measure: an address, or arguments for `warmkv serve`."""

    address: str | None
    arguments: list[str] | None

    @classmethod
    def of(cls, target: str | None, spawn: bool, model: str, server_args: str) -> ServerChoice:
        """Checks that the options don't contradict each other.

        Raises:
            ConfigError: they do, or --target is not HOST:PORT.
        """
        if target is None:
            return cls(None, ["--model", model, *shlex.split(server_args)])
        if spawn or server_args or model != DEFAULT_MODEL:
            raise ConfigError("--target names a running server: --spawn, --model and --server-args start one")
        if not target.rpartition(":")[2].isdigit():
            raise ConfigError(f"--target is {target!r}: it must be HOST:PORT")
        return cls(target, None)

    @asynccontextmanager
    async def connected(self, timeout_s: float) -> AsyncIterator[Target]:
        if self.address is not None:
            async with running_target(self.address, timeout_s) as target:
                yield target
        else:
            async with spawned_target(self.arguments or [], timeout_s) as target:
                yield target


def listed(option: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """A comma-separated option as values; raises ConfigError naming the option and what is wrong."""
    values: list[T] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            values.append(kind(part))
        except ValueError:
            raise ConfigError(f"{option} has {part!r}: {_expected(kind)}") from None
    return tuple(values)


def usage_error(message: str) -> typer.Exit:
    """Prints one sentence on what is wrong; raise what it returns, for exit status 2."""
    typer.echo(f"warmkv bench: {message}", err=True)
    return typer.Exit(USAGE)


def _expected(kind: Callable[[str], object]) -> str:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"it can be {', '.join(kind)}"
    return "it must be a whole number"
