"""`warmkv health`: whether a server serves, for people and for whoever watches over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from warmkv_server.cli.connection import DEFAULT_TARGET, Json, Target, Tls, TlsCa, Token, connected, refusing

_STORAGE = "warmkv.v1.storage"


def health(
    target: Target = DEFAULT_TARGET,
    token: Token = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    seconds: Annotated[float, typer.Option(help="How long to wait for an answer.")] = 3.0,
    as_json: Json = False,
) -> None:
    """Ask a server whether it serves, and whether its disk takes commits: exit status 0 if it serves, 1 if not.

    Needs no token. With one, also says whether the server knows it.
    """
    said: dict[str, Any] = {"status": "UNREACHABLE"}
    with refusing():
        _ask(said, target, token, tls, tls_ca, seconds)
    if as_json:
        typer.echo(json.dumps({"target": target, **said}))
    else:
        _say(said, target)
    if said["status"] != "SERVING" or said.get("token", "known") != "known":
        raise typer.Exit(1)


def _ask(said: dict[str, Any], target: str, token: str | None, tls: bool, tls_ca: Path | None, seconds: float) -> None:
    """Put into `said` what the server answers."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from warmkv.client import WarmKVError

    names = health_pb2.HealthCheckResponse.ServingStatus
    with connected(target, token, tls, tls_ca) as client:
        stub: Any = health_pb2_grpc.HealthStub(client.channel)

        def status(service: str) -> str:
            return names.Name(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=seconds).status)

        try:
            said["status"] = status("")
            said["storage"] = status(_STORAGE)
        except grpc.RpcError as caught:
            error: Any = caught
            said["error"] = error.details()
            return
        if token is not None:
            client.timeout = seconds
            try:
                client.stats()
                said["token"] = "known"
            except WarmKVError as refused:
                said["token"] = "known" if refused.is_unavailable else refused.reason


def _say(said: dict[str, Any], target: str) -> None:
    if "error" in said:
        typer.echo(f"{target} does not answer: {said['error']}", err=True)
        return
    storage = {
        "SERVING": "the disk has every commit",
        "NOT_SERVING": "the disk refuses commits, or the server isn't ready: what is asked is answered from RAM",
    }
    typer.echo(said["status"])
    if said["status"] == "SERVING" and said.get("storage") in storage:
        typer.echo(f"storage: {said['storage']} ({storage[said['storage']]})")
    if "token" in said:
        typer.echo(f"token: {said['token']}")
