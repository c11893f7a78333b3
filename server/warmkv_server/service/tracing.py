"""Traces by OpenTelemetry: a span for each request, and beneath it one for each stage of its way. Never what was said.

Imported only where the operator asks for it, for it needs the extra `otel`. Which traces are kept, and where they go,
is said by OpenTelemetry's own variables, OTEL_*.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from itertools import pairwise

import grpc
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode

from warmkv_server.errors import OperatorError
from warmkv_server.service.auth import Metadata
from warmkv_server.service.request_log import Asked, fields_of

log = logging.getLogger(__name__)

_PROTOCOL = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CLOSE_SECONDS = 5.0
"""For the last spans to reach a collector; one that isn't there doesn't hold up the server's end for longer."""

_SERVERS_FAULT = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Statuses that OpenTelemetry's conventions call errors of a server."""


class Tracing:
    """Makes spans of requests when they are over, and hands them to the thread that exports them.

    Args:
        version: of this server.

    Raises:
        OperatorError: the environment asks for what isn't there.
    """

    def __init__(self, version: str) -> None:
        ours = Resource.create({"service.name": "warmkv", "service.version": version})
        provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._exporter = _exporter()
        self._sending = BatchSpanProcessor(self._exporter)
        provider.add_span_processor(self._sending)
        self._tracer = provider.get_tracer("warmkv", version)

    def caller(self, metadata: Metadata) -> Context:
        """The span that a call comes from, as its metadata has it, such as `traceparent`."""
        return propagate.extract({key: value for key, value in metadata if isinstance(value, str)})

    def ended(self, asked: Asked, code: grpc.StatusCode, reason: str) -> None:
        """A call is over. Those that were not let in leave no trace: strangers could drown the others in them."""
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return
        since_1970 = time.time_ns() - time.perf_counter_ns()

        def wall(moment: float) -> int:
            return since_1970 + int(moment * 1e9)

        span = self._tracer.start_span(
            f"{asked.service}/{asked.rpc}",
            asked.caller,
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": asked.service, "rpc.method": asked.rpc},
            start_time=wall(asked.began),
        )
        over = asked.began + asked.seconds
        if span.is_recording():
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            span.set_attributes({f"warmkv.{name}": value for name, value in fields_of(asked, code, reason).items()})
            if code in _SERVERS_FAULT:
                span.set_status(Status(StatusCode.ERROR, reason or code.name))
            if asked.stages is not None:
                within = trace.set_span_in_context(span, asked.caller)
                for (stage, began), (_, ended) in pairwise([*asked.stages.entered, (None, over)]):
                    if stage is not None and began < over:
                        staged = self._tracer.start_span(stage.value, within, start_time=wall(began))
                        staged.end(wall(min(ended, over)))
        span.end(wall(over))

    async def close(self) -> None:
        """Send what is left."""
        flushing = asyncio.create_task(asyncio.to_thread(self._sending.force_flush))
        await asyncio.wait([flushing], timeout=_CLOSE_SECONDS)
        if not flushing.done():
            log.warning("the last traces have not reached their collector within %g seconds", _CLOSE_SECONDS)
        self._exporter.shutdown()  # which ends the flushing, too
        await flushing


def _exporter() -> SpanExporter:
    protocol = next((said for name in _PROTOCOL if (said := os.environ.get(name))), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

        return OverHttp()
    raise OperatorError(f"{_PROTOCOL[-1]} is {protocol!r}; traces are sent by grpc or http/protobuf")
