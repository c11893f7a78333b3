"""Prometheus metrics: counted as calls end, and gauges read when somebody looks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from http.server import ThreadingHTTPServer
from threading import Thread

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from warmkv_server.agents.agents import Agents
from warmkv_server.agents.compute import Tally
from warmkv_server.agents.types import GenerateFinished, PrimeResult, Timings
from warmkv_server.contract.kv import Fallback, Source
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import OperatorError
from warmkv_server.platform import descriptors
from warmkv_server.service.gate import Gate

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SCRAPE_SECONDS = 5.0


class Metrics:
    """What is counted while calls are served."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter("warmkv_rpcs", "RPCs that ended", ["method", "code"], registry=self.registry)
        self._duration = self._histogram("rpc", "From an RPC's arrival to its end", ["method"])
        self._first_token = self._histogram(
            "first_token", "From a Generate's arrival to its first token, by what was reused", ["source"]
        )
        for source in Source:
            self._first_token.labels(source)
        self._output_token = self._histogram("output_token", "Between two tokens of an answer: its mean")
        self._load = self._histogram("load", "Reading the KV that a request reuses, where files were read")
        self._commit = self._histogram("commit", "Making a context the agent's, on disk where that is waited for")
        self._http: tuple[ThreadingHTTPServer, Thread] | None = None

    def _histogram(self, name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"warmkv_{name}_seconds", text, labels, buckets=_SECONDS, registry=self.registry)

    def served(self, method: str, code: str, seconds: float) -> None:
        self._calls.labels(method, code).inc()
        self._duration.labels(method).observe(seconds)

    def answered(self, finished: GenerateFinished) -> None:
        if finished.completion_tokens:
            self._first_token.labels(finished.cache.source).observe(finished.timings.first_token)
        if finished.completion_tokens > 1:
            self._output_token.observe(finished.timings.decode / (finished.completion_tokens - 1))
        self._kept(finished.cache.bytes_loaded, finished.timings)

    def primed(self, result: PrimeResult) -> None:
        self._kept(result.cache.bytes_loaded, result.timings)

    def _kept(self, bytes_loaded: int, timings: Timings) -> None:
        if bytes_loaded:
            self._load.observe(timings.load)
        if timings.commit:
            self._commit.observe(timings.commit)

    def expose(self, settings: Settings, gate: Gate, served: int, connections: int) -> None:
        """Serve /metrics over HTTP, on threads of its own, if the operator wants it. Called on the event loop.

        Args:
            gate: once it was open, engine, store and agents are looked at too.
            served: the port of gRPC, whose connections are told too.
            connections: that there can be.

        Raises:
            OperatorError: if the port can't be had.
        """
        host, port = settings.metrics_host or settings.host, settings.metrics_port
        if port is None:
            return
        self.registry.register(_Gauges(asyncio.get_running_loop(), gate, settings))
        self.registry.register(_Connections(served, connections))
        ProcessCollector(registry=self.registry)  # memory, CPU and start time, under the names that all programs use
        try:
            self._http = start_http_server(port, host, self.registry)  # type: ignore[assignment]
        except OSError as error:
            raise OperatorError(
                f"metrics can't be served on {host}:{port} ({error.strerror}); choose another --metrics-port, or "
                "--metrics-host"
            ) from error

    def close(self) -> None:
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()


class _Gauges(Collector):
    """What engine, store and agents say of themselves, read on the event loop where they live."""

    def __init__(self, loop: asyncio.AbstractEventLoop, gate: Gate, settings: Settings) -> None:
        self._loop = loop
        self._gate = gate
        self._settings = settings

    def describe(self) -> Iterator[Metric]:
        return iter(())  # named only when collected: registering must not look

    def collect(self) -> Iterator[Metric]:
        async def look() -> list[Metric]:
            agents = self._gate.agents
            return [] if agents is None else list(_families(agents, self._settings))

        yield from _limits(self._settings)
        yield from asyncio.run_coroutine_threadsafe(look(), self._loop).result(_SCRAPE_SECONDS)


class _Connections(Collector):
    """What takes up the process's open files."""

    def __init__(self, port: int, limit: int) -> None:
        self._port = port
        self._limit = limit

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "open_files": ("Files and connections that are open", descriptors.open_files()),
            "connections_limit": ("Connections that there can be at once", self._limit),
        }
        connections = descriptors.open_connections(self._port)
        if connections is not None:
            gauges["connections"] = ("Connections of clients; at the limit further ones are closed", connections)
        for name, (text, now) in gauges.items():
            yield GaugeMetricFamily(f"warmkv_{name}", text, value=now)


def _limits(settings: Settings) -> Iterator[Metric]:
    limits = {
        "hot_bytes_limit": ("Bytes of RAM that the hot tier may hold", settings.hot_bytes),
        "disk_bytes_limit": ("Bytes that the data directory may hold; 0 for no limit", settings.disk_bytes),
        "in_flight_bytes_limit": ("Bytes that requests at work may take", settings.inflight_bytes),
        "hidden_bytes_limit": ("Bytes that contexts of requests without an agent may take", settings.anonymous_bytes),
        "queue_limit": ("Requests that may wait for the engine", settings.max_queue),
    }
    for name, (text, limit) in limits.items():
        yield GaugeMetricFamily(f"warmkv_{name}", text, value=limit)


def _families(agents: Agents, settings: Settings) -> Iterator[Metric]:
    engine, store, tally = agents.engine.stats(), agents.store.stats(), agents.tallies.total
    info = agents.engine.info
    told = {"model": info.model_id, "device": info.device, "fingerprint": agents.store.fingerprint}
    told |= {name.replace("-", "_"): version for name, version in info.versions.items()}
    yield InfoMetricFamily("warmkv_build", "What is served, and by which versions", value=told)
    counters: dict[str, tuple[str, float]] = {
        "hot_tokens_reused": ("Prompt tokens whose KV was in RAM", tally.hot_tokens),
        "warm_tokens_reused": ("Prompt tokens whose KV was read from disk", tally.warm_tokens),
        "shared_tokens_reused": ("Prompt tokens whose KV was another agent's", tally.shared_tokens),
        "anonymous_tokens_reused": (
            "Of these, what requests without an agent had of others without one",
            tally.anonymous_tokens,
        ),
        "spliced_tokens": ("Prompt tokens that took the place of others of the same text", tally.spliced_tokens),
        "prefilled_tokens": ("Prompt tokens whose KV was computed for requests that finished", tally.prefilled_tokens),
        "computed_tokens": ("Prompt tokens whose KV was computed, also for those that didn't", engine.prefilled_tokens),
        "decoded_tokens": ("Tokens sampled", engine.decoded_tokens),
        "proposed_tokens": ("Tokens guessed from the context and checked", engine.proposed_tokens),
        "accepted_tokens": ("Tokens guessed right", engine.accepted_tokens),
        "preemptions": ("Requests that gave way to another tenant's, each time", engine.preempted),
        "loaded_bytes": ("Bytes read from block files", store.bytes_loaded),
        "kv_written_bytes": ("Bytes of block files written", store.kv_bytes_written),
        "metadata_written_bytes": ("Bytes of the index and the manifests written", store.metadata_bytes_written),
        "evictions": ("Agents that left RAM", store.evictions),
        "quarantined_files": ("Files put into quarantine", store.quarantined),
        "failed_commits": ("Commits that the disk refused", store.commits_failed),
    }
    for name, (text, total) in counters.items():
        yield CounterMetricFamily(f"warmkv_{name}", text, value=total)
    gauges: dict[str, tuple[str, float]] = {
        "hot_bytes": ("Bytes of RAM that the hot tier holds", store.hot_bytes),
        "disk_bytes": ("Bytes that the data directory holds", store.disk_bytes),
        "outcome_bytes": ("Bytes of RAM that answers kept for retries take", store.outcome_bytes),
        "in_flight_bytes": ("Bytes that running sequences may take", engine.in_flight_bytes),
        "not_durable_agents": ("Agents whose last commit is in RAM only", store.not_durable),
        "stale_agents": ("Agents whose KV belongs to another model or other KV settings", store.stale_agents),
        "hidden_agents": ("Contexts of requests without an agent, which are kept for a while", store.hidden_agents),
        "hidden_bytes": ("Bytes that these alone take on disk and in the index", store.hidden_bytes),
        "queue_depth": ("Requests that wait", agents.waiting),
        "prefilling": ("Sequences whose prompt is being computed", engine.prefilling),
        "decoding": ("Sequences whose answer is being sampled", engine.decoding),
    }
    for name, (text, now) in gauges.items():
        yield GaugeMetricFamily(f"warmkv_{name}", text, value=now)
    tiers = GaugeMetricFamily("warmkv_agents", "Agents by tier", labels=["tier"])
    for tier, number in store.agents_by_tier.items():
        tiers.add_metric([tier], number)
    yield tiers
    sources = CounterMetricFamily("warmkv_requests", "Finished requests by cache source", labels=["source"])
    for source in Source:
        sources.add_metric([source], tally.requests[source])
    yield sources
    fallbacks = CounterMetricFamily("warmkv_fallbacks", "Requests that reused less than expected", labels=["reason"])
    for reason in Fallback:
        fallbacks.add_metric([reason], tally.fallbacks[reason])
    yield fallbacks
    if settings.token_file is not None:
        yield from _by_tenant(agents.tallies.by_tenant)


def _by_tenant(tallies: Mapping[str, Tally]) -> Iterator[Metric]:
    """Of those who have asked for something; the token file says how many there can be."""
    requests = CounterMetricFamily("warmkv_tenant_requests", "Finished requests of a tenant", labels=["tenant"])
    reused = CounterMetricFamily(
        "warmkv_tenant_reused_tokens", "Prompt tokens of a tenant whose KV was there", labels=["tenant"]
    )
    prefilled = CounterMetricFamily(
        "warmkv_tenant_prefilled_tokens", "Prompt tokens of a tenant whose KV was computed", labels=["tenant"]
    )
    for tenant, tally in tallies.items():
        requests.add_metric([tenant], tally.requests.total())
        reused.add_metric([tenant], tally.hot_tokens + tally.warm_tokens + tally.shared_tokens)
        prefilled.add_metric([tenant], tally.prefilled_tokens)
    yield from (requests, reused, prefilled)
