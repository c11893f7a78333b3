"""The whole server on one page: what is wired to what, and the order of shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from warmkv_server.agents.agents import Agents
from warmkv_server.contract.pressure import MemoryPressure
from warmkv_server.contract.settings import CONSTANTS, LOOPBACK, Settings
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.steps.loop import SOON_SECONDS
from warmkv_server.errors import InvalidField, ServerFailed
from warmkv_server.kv.store import Fingerprint, Store
from warmkv_server.platform import blas, descriptors
from warmkv_server.platform.signals import StopSignals
from warmkv_server.service.agent_servicer import AgentServicer
from warmkv_server.service.auth import BearerTokens, Open
from warmkv_server.service.endpoint import Endpoints
from warmkv_server.service.gate import Gate
from warmkv_server.service.metrics import Metrics
from warmkv_server.service.response_codecs import response_codecs
from warmkv_server.service.server import GrpcServer
from warmkv_server.service.server_servicer import ServerServicer
from warmkv_server.shutdown import Shutdown
from warmkv_server.text.launch import StartedProcess
from warmkv_server.text.probe import unusual

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


async def serve(settings: Settings, text: StartedProcess) -> int:
    """Serve until SIGTERM or SIGINT, then drain. A second signal cuts the draining short.

    Args:
        text: the first process for text work.

    Returns:
        The exit status; see shutdown.py.

    Raises:
        OperatorError: if the server can't be started as it was asked to.
        ServerFailed: if it can't go on, though nobody told it to stop.
    """
    signals, pressure = StopSignals(), MemoryPressure()
    gate, metrics = Gate(), Metrics()
    auth = BearerTokens.load(settings.token_file) if settings.token_file is not None else Open()
    server = GrpcServer(
        settings,
        Endpoints(gate, auth, metrics, settings),
        AgentServicer(settings, metrics),
        ServerServicer(settings, auth.tenants),
        connections := descriptors.for_connections(),
    )
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
        )
        engine = await _unless_stopped(_loaded(settings, starting), signals.first)
        try:
            store = await Store.open(
                settings,
                replace(engine.info.layout, vocabulary=engine.info.vocab_size),
                Fingerprint.of_model(engine.info.fingerprint_fields),
                tenants=auth.tenants,
                pressure=pressure,
                busy=lambda: engine.decoding,
                tell=server.say_storage,
            )
            shutdown = Shutdown(store, signals, settings)
            try:
                await _unless_stopped(engine.text.ready(), signals.first)
                await _unless_stopped(_say_unusual(engine), signals.first)
                agents = Agents(engine, store, settings, response_codecs(), auth.tenants)
                gate.open(agents, engine.text_bytes)
                # Else looking through all that was loaded, for what nobody refers to, stops every thread now and then.
                gc.collect()
                gc.freeze()
                server.announce()
                print(f"listening on {settings.host}:{port}", flush=True)

                stops: list[asyncio.Future[Any]] = [signals.first, server.lost, engine.lost]
                await asyncio.wait(stops, return_when=asyncio.FIRST_COMPLETED)
                log.info("draining for up to %g seconds", settings.drain_seconds)
                server.withdraw()
                gate.close()
                status = await shutdown.drain(agents, gate)
            finally:
                await shutdown.close()
        finally:
            await engine.stop()
    finally:
        await server.stop(grace=0)
        metrics.close()
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


async def _say_unusual(engine: Engine) -> None:
    """What clients may run into, of the model's tokenizer and chat template; `warmkv models check` says all of it."""
    try:
        for line in unusual(await engine.text.probe()):
            log.warning("%s: %s", engine.info.model_id, line)
    except (InvalidField, RuntimeError) as error:
        log.warning("%s: the tokenizer and the chat template can't be tried: %s", engine.info.model_id, error)


async def _unless_stopped(loading: Coroutine[Any, Any, Loaded], stop: asyncio.Future[None]) -> Loaded:
    task = asyncio.create_task(loading)
    waited: list[asyncio.Future[Any]] = [task, stop]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        # Loading a model can't be interrupted, and nothing has been promised that could be lost.
        log.info("stopped while loading")
        logging.shutdown()
        os._exit(0)
    return await task
