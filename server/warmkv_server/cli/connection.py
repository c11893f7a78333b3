"""What commands that talk to a server have in common: the options that say which one, and how its errors are told.

Nothing here, nor what these commands import, knows MLX: they start in a moment.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from warmkv_server.errors import OperatorError

if TYPE_CHECKING:
    from warmkv.client import Client, WarmKVError

DEFAULT_TARGET = "127.0.0.1:50051"

Target = Annotated[str, typer.Option(envvar="WARMKV_TARGET", help="Address of the server, HOST:PORT.")]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="WARMKV_TOKEN", help="A token of the server's token file; better in the environment.", metavar="TOKEN"
    ),
]
Tls = Annotated[bool, typer.Option("--tls", help="Speak TLS, with the certificates that gRPC trusts.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(envvar="WARMKV_TLS_CA", help="Speak TLS and trust the certificates in this PEM file.", metavar="FILE"),
]
Json = Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")]

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "target": (Target, DEFAULT_TARGET),
    "token": (Token, None),
    "tls": (Tls, False),
    "tls_ca": (TlsCa, None),
}

_AT_ONCE = (("grpc.enable_retries", 0),)
"""A person hears at once that there is no server; the chat waits for one by its own means."""


def on_server(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first argument is a client: it gets the options that say of which server."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        where = {name: given.pop(name) for name in _OPTIONS}
        with refusing(), connected(**where) as client:
            command(client, **given)

    _, *own = inspect.signature(command, eval_str=True, locals={"Client": Any}).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    theirs = [inspect.Parameter(n, keyword, default=d, annotation=kind) for n, (kind, d) in _OPTIONS.items()]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*(each.replace(kind=keyword) for each in own), *theirs]
    )
    run.__annotations__ = {}
    del run.__wrapped__
    return run


@contextmanager
def connected(target: str, token: str | None = None, tls: bool = False, tls_ca: Path | None = None) -> Iterator[Client]:
    """A client of a server; its errors become sentences.

    Raises:
        OperatorError: the certificates can't be read.
    """
    from warmkv.client import Client, WarmKVError

    try:
        client = Client(target, token=token, tls=tls, tls_ca=tls_ca, options=_AT_ONCE)
    except OSError as error:
        raise OperatorError(f"--tls-ca {tls_ca} can't be read: {error.strerror or error}") from error
    with client:
        try:
            yield client
        except WarmKVError as error:
            fail(sentence(target, error))


def sentence(target: str, error: WarmKVError) -> str:
    """What went wrong, and what to do where that isn't in the server's own words."""
    if error.is_unavailable and not error.reason:
        return (
            f"no server answers at {target} ({error.message}); start one with `warmkv serve`, or name another with "
            "--target; one with TLS needs --tls or --tls-ca"
        )
    if error.reason in ("TOKEN_MISSING", "TOKEN_INVALID"):
        return f"{error.message}; give a token of its token file in WARMKV_TOKEN, or with --token"
    return error.message or str(error)


@contextmanager
def refusing() -> Iterator[None]:
    """What the operator did wrong in one sentence on stderr, and exit status 2."""
    try:
        yield
    except OperatorError as error:
        fail(str(error), 2)


def fail(words: str, status: int = 1) -> NoReturn:
    typer.echo(f"warmkv: {words}", err=True)
    raise typer.Exit(status)
