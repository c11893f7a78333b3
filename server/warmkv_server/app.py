"""The whole server on one page: what is wired to what, and the order of shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from warmkv_server.agents.agents import Agents
from warmkv_server.contract.model import ModelInfo
from warmkv_server.contract.pressure import MemoryPressure
from warmkv_server.contract.settings import CONSTANTS, LOOPBACK, Settings
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.model.load_progress import LoadProgress, untold
from warmkv_server.engine.steps.loop import SOON_SECONDS
from warmkv_server.errors import InvalidField, OperatorError, ServerFailed
from warmkv_server.kv.store import Fingerprint, Store
from warmkv_server.platform import blas, descriptors, memory
from warmkv_server.platform.signals import StopSignals, on_hangup
from warmkv_server.platform.versions import version_of
from warmkv_server.service.agent_servicer import AgentServicer
from warmkv_server.service.auth import Auth, BearerTokens, Open
from warmkv_server.service.endpoint import Endpoints
from warmkv_server.service.gate import Gate
from warmkv_server.service.metrics import Metrics
from warmkv_server.service.response_codecs import response_codecs
from warmkv_server.service.server import GrpcServer
from warmkv_server.service.server_servicer import ServerServicer
from warmkv_server.service.tls import Certificate
from warmkv_server.shutdown import Shutdown
from warmkv_server.text.launch import StartedProcess
from warmkv_server.text.probe import abilities, unusual
from warmkv_server.text.template_file import require_usable

if TYPE_CHECKING:
    from warmkv_server.service.tracing import Tracing

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Serving:
    """What is served, once it is.

    Attributes:
        address: HOST:PORT.
        agents: of all tenants.
        stale: those whose KV this model can't use, by the reason.
    """

    address: str
    settings: Settings
    info: ModelInfo
    agents: int
    stale: Mapping[str, int]


async def serve(
    settings: Settings,
    text: StartedProcess,
    tell: Callable[[Serving], None],
    progress: LoadProgress = untold,
    given_up: Callable[[], object] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain. A second signal cuts the draining short.

    Args:
        text: the first process for text work.
        tell: is called when calls are served.
        progress: is called while the model loads, on another thread.
        given_up: is called if it is stopped meanwhile, which ends the process here.

    Returns:
        The exit status; see shutdown.py.

    Raises:
        OperatorError: if the server can't be started as it was asked to.
        ServerFailed: if it can't go on, though nobody told it to stop.
    """
    signals, pressure = StopSignals(), MemoryPressure()
    gate, metrics, tracing = Gate(), Metrics(), _tracing(settings)
    auth = BearerTokens(settings.token_file) if settings.token_file is not None else Open()
    certificate = Certificate.of(settings)
    lock = await Store.take(settings)
    server = GrpcServer(
        settings,
        Endpoints(gate, auth, metrics, settings, tracing=tracing),
        AgentServicer(settings, metrics),
        ServerServicer(settings, auth.tenants),
        connections := descriptors.for_connections(),
        certificate,
    )
    _reload_on_hangup(auth, certificate)
    _warn_of_budgets(settings)
    if settings.token_file is not None and settings.tls_cert is None and settings.host not in LOOPBACK:
        log.warning(
            "tokens and conversations cross the network of --host %s in clear: give --tls-cert and --tls-key, unless "
            "something in front of this server encrypts them",
            settings.host,
        )
    port = server.bind()
    metrics.expose(settings, gate, port, connections)
    await server.start()  # already now, so that health can say that the model is loading
    try:
        starting = Engine.start(
            settings,
            text,
            tenants=auth.tenants,
            constants=settings.data_dir / CONSTANTS,
            pressure=pressure,
            tell=server.say_engine,
            progress=progress,
        )
        engine = await _unless_stopped(_loaded(settings, starting), signals.first, given_up)
        try:
            store = await Store.open(
                settings,
                replace(engine.info.layout, vocabulary=engine.info.vocab_size),
                Fingerprint.of_model(engine.info.fingerprint_fields),
                lock=lock,
                tenants=auth.tenants,
                pressure=pressure,
                busy=lambda: engine.decoding,
                tell=server.say_storage,
            )
            shutdown = Shutdown(store, signals, settings)
            try:
                await _unless_stopped(engine.text.ready(), signals.first, given_up)
                await _unless_stopped(_say_unusual(engine, settings.chat_template), signals.first, given_up)
                agents = Agents(engine, store, settings, response_codecs(), auth.tenants)
                gate.open(agents, engine.text_bytes)
                # Else looking through all that was loaded, for what nobody refers to, stops every thread now and then.
                gc.collect()
                gc.freeze()
                server.announce()
                agents_now = sum(store.stats().agents_by_tier.values())
                tell(Serving(f"{settings.host}:{port}", settings, engine.info, agents_now, store.stale()))

                stops: list[asyncio.Future[Any]] = [signals.first, server.lost, engine.lost]
                await asyncio.wait(stops, return_when=asyncio.FIRST_COMPLETED)
                server.withdraw()
                await shutdown.notice()
                log.info("draining for up to %g seconds", settings.drain_seconds)
                gate.close()
                status = await shutdown.drain(agents, gate)
            finally:
                await shutdown.close()
        finally:
            await engine.stop()
    finally:
        await server.stop(grace=0)
        metrics.close()
        if tracing is not None:
            await tracing.close()
    if server.lost.done():
        raise ServerFailed(
            f"gRPC's server ended by itself and port {port} could not be had again: what was committed is kept, but "
            "nobody is served; start the server again"
        )
    if engine.lost.done():
        raise ServerFailed(
            f"the engine has failed twice within {SOON_SECONDS:g} seconds and can't go on; all that was committed is "
            f"kept: look for {engine.lost.result()} in the log, and start the server again"
        )
    log.info("stopped")
    return status


def _tracing(settings: Settings) -> Tracing | None:
    """What makes traces, where the operator wants them; else none of it is imported."""
    if not settings.tracing:
        return None
    try:
        from warmkv_server.service.tracing import Tracing
    except ModuleNotFoundError as error:
        raise OperatorError(
            f"--tracing needs OpenTelemetry, which is not installed ({error.name} is missing): install the extra "
            "`otel` of warmkv, or leave --tracing out"
        ) from error
    return Tracing(version_of("warmkv"))


def _reload_on_hangup(auth: Auth, certificate: Certificate | None) -> None:
    """Where there are files of tokens or a certificate, SIGHUP has them read again; a bad one changes nothing."""
    files = [each for each in (auth, certificate) if isinstance(each, BearerTokens | Certificate)]

    def reload() -> None:
        for each in files:
            try:
                log.info("SIGHUP: read again %s", each.reload())
            except OperatorError as error:
                log.error("SIGHUP changed nothing: %s", error)

    if files:
        on_hangup(reload)


def _warn_of_budgets(settings: Settings) -> None:
    memory_bytes = memory.usable_bytes()
    budgets = settings.hot_bytes + 2 * settings.inflight_bytes
    if budgets > memory_bytes:
        log.warning(
            "--hot-bytes and twice --inflight-bytes are %d bytes together, and this machine, or the container, has %d: "
            "with full budgets the system ends the server; give less, and leave room for the model",
            budgets,
            memory_bytes,
        )


async def _loaded(settings: Settings, starting: Coroutine[Any, Any, Engine]) -> Engine:
    """The engine with its model, and what the log says of that."""
    if blas.is_reference():
        log.warning(
            "no fast BLAS was found: this CPU computes tens of times slower than it could; "
            "install the `cpu` extra of warmkv, or the system's OpenBLAS"
        )
    log.info("loading %s", settings.model)
    began = time.perf_counter()
    engine = await starting
    where = f"{engine.info.device}, {engine.info.blas}" if engine.info.blas else engine.info.device
    log.info("loaded %s in %.1f seconds (%s)", engine.info.model_id, time.perf_counter() - began, where)
    return engine


async def _say_unusual(engine: Engine, chat_template: Path | None) -> None:
    """What clients may run into, of the model's tokenizer and chat template; `warmkv models check` says all of it.

    Raises:
        OperatorError: the chat template that was given is none.
    """
    try:
        findings = await engine.text.probe()
        if chat_template is not None:
            require_usable(chat_template, findings)
        for line in unusual(findings):
            log.warning("%s: %s", engine.info.model_id, line)
        if said := abilities(findings):
            log.info("%s: %s", engine.info.model_id, said)
    except (InvalidField, RuntimeError) as error:
        if chat_template is not None:
            raise OperatorError(f"--chat-template {chat_template} can't be tried: {error}") from error
        log.warning("%s: the tokenizer and the chat template can't be tried: %s", engine.info.model_id, error)


async def _unless_stopped(
    loading: Coroutine[Any, Any, Loaded], stop: asyncio.Future[None], given_up: Callable[[], object]
) -> Loaded:
    task = asyncio.create_task(loading)
    waited: list[asyncio.Future[Any]] = [task, stop]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        # Loading a model can't be interrupted, and nothing has been promised that could be lost.
        given_up()
        log.info("stopped while loading")
        logging.shutdown()
        os._exit(0)
    return await task
