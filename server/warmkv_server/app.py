"""The whole server on one page: what is wired to what, and the order of shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from warmkv_server import blas
from warmkv_server.agents.agents import Agents, AgentSettings
from warmkv_server.config import Settings
from warmkv_server.engine.engine import Engine, EngineSettings
from warmkv_server.engine.fairness import Bound
from warmkv_server.errors import Draining
from warmkv_server.kv.blockfile import VERSION as BLOCK_FORMAT
from warmkv_server.kv.store import Durability, Fingerprint, Store, StoreSettings
from warmkv_server.service.agent_servicer import AgentServicer
from warmkv_server.service.auth import BearerTokens, Open
from warmkv_server.service.endpoint import Endpoints
from warmkv_server.service.gate import Gate
from warmkv_server.service.metrics import Metrics
from warmkv_server.service.server import GrpcServer, Tls
from warmkv_server.service.server_servicer import Facts, ServerServicer
from warmkv_server.signals import StopSignals, first_of

log = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 2.0
"""For the last messages of streams whose client reads slowly, once everything is committed. No signal takes it away:
what was sampled for a client and kept should reach it."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal cuts the draining short.

    Raises:
        OperatorError: if the server can't be started as it was asked to.
    """
    signals = StopSignals()
    gate, metrics = Gate(), Metrics()
    auth = BearerTokens.load(settings.token_file) if settings.token_file is not None else Open()
    server = GrpcServer(
        Endpoints(gate, auth, metrics, settings.max_message_bytes),
        AgentServicer(settings.default_max_tokens, metrics),
        ServerServicer(_facts(settings)),
    )
    tls = Tls(settings.tls_cert, settings.tls_key) if settings.tls_cert and settings.tls_key else None
    port = server.bind(settings.host, settings.port, tls)
    if settings.metrics_port is not None:
        metrics.expose(settings.host, settings.metrics_port)
    await server.start()  # already now, so that health can say that the model is loading
    try:
        engine = await _unless_stopped(_load_engine(settings, auth.tenants), signals.first)
        try:
            fingerprint = Fingerprint.of_model(engine.info.fingerprint_fields)
            layout = replace(engine.info.layout, vocabulary=engine.info.vocab_size)
            store = await Store.open(_store_settings(settings), layout, fingerprint)
            engine.relieve = store.relieve
            store.give_way(lambda: engine.stats().decoding > 0)
            agent_settings = AgentSettings(
                waiting=Bound(settings.max_queue, auth.tenants),
                loaded_bytes=settings.inflight_bytes,
                synced=settings.durability != "none",
            )
            agents = Agents(engine, store, fingerprint.digest, agent_settings)
            metrics.watch(agents)
            store.watch_disk(server.say_storage)
            gate.open(agents)
            # Else looking through all that was loaded, for what nobody refers to, stops every thread now and then.
            gc.collect()
            gc.freeze()
            await server.announce()
            print(f"listening on {settings.host}:{port}", flush=True)

            await signals.first
            log.info("draining for up to %g seconds", settings.drain_seconds)
            await server.withdraw()
            gate.close()
            await first_of(agents.idle(), signals.second, settings.drain_seconds)
            agents.stop_all(Draining("the server is shutting down", retry_after=5.0))
            await agents.idle()  # what was sampled is committed
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gate.empty(), _LAST_WORDS_SECONDS)
            await store.close()
        finally:
            await engine.stop()
    finally:
        await server.stop(grace=0)
        metrics.close()
    log.info("stopped")


async def _load_engine(settings: Settings, tenants: int) -> Engine:
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
            kv_bits=settings.kv_bits,
            kv_group_size=settings.kv_group_size,
            context_limit=settings.context_limit,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            tenants=tenants,
            inflight_bytes=settings.inflight_bytes,
            prefill_chunk=settings.prefill_chunk,
            max_decode_gap_ms=settings.max_decode_gap_ms,
            speculate_tokens=settings.speculate_tokens,
        )
    )
    where = f"{engine.info.device}, {engine.info.blas}" if engine.info.blas else engine.info.device
    log.info("loaded %s in %.1f seconds (%s)", engine.info.model_id, time.perf_counter() - began, where)
    return engine


def _store_settings(settings: Settings) -> StoreSettings:
    return StoreSettings(
        data_dir=settings.data_dir,
        hot_bytes=settings.hot_bytes,
        disk_bytes=settings.disk_bytes,
        durability=Durability(settings.durability),
        load_timeout=settings.load_seconds,
    )


def _facts(settings: Settings) -> Facts:
    return Facts(
        hot_bytes=settings.hot_bytes,
        disk_bytes=settings.disk_bytes,
        durability=Durability(settings.durability),
        default_max_tokens=settings.default_max_tokens,
        block_format=str(BLOCK_FORMAT),
    )


async def _unless_stopped(loading: Coroutine[Any, Any, Engine], stop: asyncio.Future[None]) -> Engine:
    task = asyncio.create_task(loading)
    waited: list[asyncio.Future[Any]] = [task, stop]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        # Loading a model can't be interrupted, and nothing has been written that could be lost.
        log.info("stopped while loading")
        logging.shutdown()
        os._exit(0)
    return await task
