"""The whole server on one page: what is wired to what, and the order of shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from warmkv_server.agents.agents import Agents, AgentSettings
from warmkv_server.config import LOOPBACK, Settings
from warmkv_server.contract.fairness import Bound
from warmkv_server.contract.model import ModelInfo
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.engine import Engine, EngineSettings
from warmkv_server.engine.steps.loop import SOON_SECONDS
from warmkv_server.errors import InvalidField, ServerFailed
from warmkv_server.kv.blocks.blockfile import VERSION as BLOCK_FORMAT
from warmkv_server.kv.store import Durability, Fingerprint, Store, StoreSettings
from warmkv_server.platform import blas, descriptors
from warmkv_server.platform.signals import StopSignals
from warmkv_server.service.agent_servicer import AgentServicer
from warmkv_server.service.auth import BearerTokens, Open
from warmkv_server.service.codecs import codecs
from warmkv_server.service.endpoint import Endpoints
from warmkv_server.service.gate import Gate
from warmkv_server.service.metrics import Metrics
from warmkv_server.service.server import GrpcServer, Tls
from warmkv_server.service.server_servicer import Facts, ServerServicer
from warmkv_server.shutdown import Shutdown
from warmkv_server.text.launch import Started
from warmkv_server.text.probe import unusual

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


async def serve(settings: Settings, text: Started, tell: Callable[[Serving], None]) -> int:
    """Serve until SIGTERM or SIGINT, then drain. A second signal cuts the draining short.

    Args:
        text: the first process for text work.
        tell: is called when calls are served.

    Returns:
        The exit status; see shutdown.py.

    Raises:
        OperatorError: if the server can't be started as it was asked to.
        ServerFailed: if it can't go on, though nobody told it to stop.
    """
    signals = StopSignals()
    gate, metrics = Gate(), Metrics()
    auth = BearerTokens.load(settings.token_file) if settings.token_file is not None else Open()
    server = GrpcServer(
        Endpoints(gate, auth, metrics, settings.max_message_bytes),
        AgentServicer(settings.default_max_tokens, metrics),
        ServerServicer(_facts(settings, auth.tenants)),
        connections := descriptors.for_connections(),
    )
    if settings.token_file is not None and settings.tls_cert is None and settings.host not in LOOPBACK:
        log.warning(
            "tokens and conversations cross the network of --host %s in clear: give --tls-cert and --tls-key, unless "
            "something in front of this server encrypts them",
            settings.host,
        )
    tls = Tls(settings.tls_cert, settings.tls_key) if settings.tls_cert and settings.tls_key else None
    port = server.bind(settings.host, settings.port, tls, settings.health_port)
    metrics.watch_connections(port, connections)
    if settings.metrics_port is not None:
        metrics.expose(settings.host, settings.metrics_port)
    await asyncio.to_thread(Store.probe, settings.data_dir)  # not only when the model is loaded
    await server.start()  # already now, so that health can say that the model is loading
    try:
        engine = await _unless_stopped(_load_engine(settings, auth.tenants, text), signals.first)
        try:
            fingerprint = Fingerprint.of_model(engine.info.fingerprint_fields)
            layout = replace(engine.info.layout, vocabulary=engine.info.vocab_size)
            store = await Store.open(_store_settings(settings, auth.tenants), layout, fingerprint)
            shutdown = Shutdown(store, signals, settings.drain_seconds)
            try:
                await _unless_stopped(engine.text.ready(), signals.first)
                await _unless_stopped(_say_unusual(engine), signals.first)
                engine.relieve = store.relieve
                store.give_way(lambda: engine.decoding)
                agent_settings = AgentSettings(
                    waiting=Bound(settings.max_queue, auth.tenants),
                    loaded_bytes=settings.inflight_bytes,
                    synced=settings.durability != "none",
                )
                agents = Agents(engine, store, store.fingerprint, agent_settings, codecs())
                metrics.watch(agents)
                store.watch_disk(server.say_storage)
                gate.open(agents, engine.text_bytes)
                # Else looking through all that was loaded, for what nobody refers to, stops every thread now and then.
                gc.collect()
                gc.freeze()
                server.announce()
                engine.watch = server.say_engine
                agents_now = sum(store.stats().agents_by_tier.values())
                tell(Serving(f"{settings.host}:{port}", settings, engine.info, agents_now, store.stale()))

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


async def _load_engine(settings: Settings, tenants: int, text: Started) -> Engine:
    if blas.is_reference():
        log.warning(
            "no fast BLAS was found: this CPU computes tens of times slower than it could; "
            "install the `cpu` extra of warmkv, or the system's OpenBLAS"
        )
    log.info("loading %s", settings.model)
    began = time.perf_counter()
    engine = await Engine.start(
        EngineSettings(
            model=settings.model,
            adapter=settings.adapter,
            codecs=codecs_for(settings.kv_bits, settings.kv_group_size),
            context_limit=settings.context_limit,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            tenants=tenants,
            inflight_bytes=settings.inflight_bytes,
            prefill_chunk=settings.prefill_chunk,
            max_decode_gap_ms=settings.max_decode_gap_ms,
            speculate_tokens=settings.speculate_tokens,
        ),
        text,
    )
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


def _store_settings(settings: Settings, tenants: int) -> StoreSettings:
    return StoreSettings(
        data_dir=settings.data_dir,
        hot_bytes=settings.hot_bytes,
        disk_bytes=settings.disk_bytes,
        durability=Durability(settings.durability),
        load_timeout=settings.load_seconds,
        tenants=tenants,
    )


def _facts(settings: Settings, tenants: int) -> Facts:
    return Facts(
        hot_bytes=settings.hot_bytes,
        disk_bytes=settings.disk_bytes,
        durability=Durability(settings.durability),
        default_max_tokens=settings.default_max_tokens,
        block_format=str(BLOCK_FORMAT),
        tenants=tenants,
    )


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
