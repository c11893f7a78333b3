"""Traces, as a collector gets them from a real server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.harness import Client, Server, chat, refused, serving, text
from tests.e2e.waiting import await_that, read_deltas

SECRET = "xylophone"
TOKEN = "a" * 32
CALLER = "00f067aa0ba902b7"
"""The span that a test's calls come from."""
NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "AGENT_NOT_FOUND")
UNKNOWN = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
STAGES = ["queue", "queue", "load", "queue", "prefill", "decode", "commit"]
"""It waits for its agent's turn, for memory, and for the engine."""


class Collector:
    """Keeps what it is sent."""

    def __init__(self, endpoint: str, stop: Callable[[], object]) -> None:
        self.endpoint = endpoint
        self.stop = stop
        self.received: list[otlp.ExportTraceServiceRequest] = []

    def Export(self, request: otlp.ExportTraceServiceRequest, _: object) -> otlp.ExportTraceServiceResponse:  # noqa: N802
        self.received.append(request)
        return otlp.ExportTraceServiceResponse()

    def spans(self) -> Iterator[Span]:
        for request in list(self.received):
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    yield from scope.spans

    def trace(self, number: int) -> tuple[Span, list[Span]]:
        """The request of a trace, once it is there, and its stages in order."""
        trace_id = number.to_bytes(16, "big")

        def found() -> list[Span]:
            return [span for span in self.spans() if span.trace_id == trace_id]

        await_that(lambda: any(span.parent_span_id.hex() == CALLER for span in found()))
        (request,) = (span for span in found() if span.parent_span_id.hex() == CALLER)
        stages = [span for span in found() if span is not request]
        assert {span.parent_span_id for span in stages} <= {request.span_id}
        return request, sorted(stages, key=lambda span: span.start_time_unix_nano)


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def came_from(number: int, *, sampled: bool = True) -> list[tuple[str, str]]:
    """The metadata of a call that belongs to a trace."""
    return [("traceparent", f"00-{number:032x}-{CALLER}-{'01' if sampled else '00'}")]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector over gRPC."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    collector = Collector(f"http://127.0.0.1:{port}", lambda: server.stop(None).wait())
    serve: Any = otlp_grpc.add_TraceServiceServicer_to_server
    serve(collector, server)
    server.start()
    try:
        yield collector
    finally:
        collector.stop()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Collector]]:
    folder = tmp_path_factory.mktemp("traced")
    (folder / "tokens").write_text(f"red {TOKEN}\n")
    with collecting() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        flags = ("--tracing", "--token-file", str(folder / "tokens"))
        with serving(folder / "data", *flags, environment=environment) as (server, _):
            yield server, collector


def test_an_answer_is_a_span_with_its_stages_and_without_its_words(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    with Client(server.address, token=TOKEN, metadata=came_from(1)) as client:
        client.prime("ada", chat(("system", f"You know of the {SECRET}.")), request_id="the-prime")
        client.evict("ada")
    with Client(server.address, token=TOKEN, metadata=came_from(2)) as client:
        answer = client.generate("ada", chat(("user", f"Where is the {SECRET}?")), max_tokens=9, request_id="the-one")
    request, stages = collector.trace(2)
    assert request.name == "warmkv.v1.AgentService/Generate"
    assert request.kind == Span.SPAN_KIND_SERVER
    assert [span.name for span in stages] == STAGES
    moments = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in stages]
    in_order = [request.start_time_unix_nano, *(each for both in moments for each in both), request.end_time_unix_nano]
    assert in_order == sorted(in_order)
    told = attributes(request)
    assert (told["rpc.method"], told["rpc.grpc.status_code"], told["warmkv.status"]) == ("Generate", 0, "OK")
    assert (told["warmkv.id"], told["warmkv.tenant"], told["warmkv.agent"]) == ("the-one", "red", "ada")
    cache = answer.cache
    assert (told["warmkv.source"], told["warmkv.cached"]) == ("warm", cache.cached_tokens)
    assert (told["warmkv.prefilled"], told["warmkv.completion"]) == (cache.prefilled_tokens, 9)
    sent = b"".join(request.SerializeToString() for request in collector.received)
    assert b"the-one" in sent
    assert SECRET.encode() not in sent
    assert answer.text.strip().encode() not in sent
    assert TOKEN.encode() not in sent
    (resource,) = {request.resource_spans[0].resource.SerializeToString() for request in collector.received}
    assert b"warmkv" in resource


def test_a_refusal_and_a_cancellation_show_how_far_they_came(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    with Client(server.address, token=TOKEN, metadata=came_from(3)) as client, refused(*NOT_FOUND):
        client.extend("nobody", text(SECRET))
    request, stages = collector.trace(3)
    assert [span.name for span in stages] == ["queue"]
    assert attributes(request)["warmkv.reason"] == "AGENT_NOT_FOUND"
    assert request.status.code == 0  # the caller's fault is no error of a server's
    with Client(server.address, token=TOKEN, metadata=came_from(4)) as client:
        stream = client.stream("bob", text(SECRET), max_tokens=20_000, ignore_eos=True)
        read_deltas(stream, 1)
        stream.cancel()
        request, stages = collector.trace(4)
    assert [span.name for span in stages][-1] == "decode"
    assert attributes(request)["warmkv.status"] == "CANCELLED"


def test_what_leaves_no_trace(traced: tuple[Server, Collector]) -> None:
    """What the caller doesn't sample, and what strangers ask."""
    server, collector = traced
    with Client(server.address, token=TOKEN, metadata=came_from(5, sampled=False)) as client:
        client.generate("eve", text("Hello"), max_tokens=3)
    with Client(server.address, token="a-guess", metadata=came_from(6)) as stranger, refused(*UNKNOWN):
        stranger.get("eve")
    with Client(server.address, token=TOKEN, metadata=came_from(7)) as client:
        client.get("eve")
    collector.trace(7)
    assert not {5, 6} & {int.from_bytes(span.trace_id, "big") for span in collector.spans()}


def test_a_collector_that_is_gone_holds_up_nobody(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    collector.stop()
    with Client(server.address, token=TOKEN) as client:
        client.generate("eve", text("Hello"), max_tokens=3)
    assert server.terminate() == 0


def test_over_http_under_another_name(tmp_path: Path) -> None:
    """And the last spans are sent before the server ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.received.append(otlp.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *_: Any) -> None:  # noqa: A002 - the library's name
            """Nothing."""

    http = HTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{http.server_port}", http.shutdown)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    environment = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_SERVICE_NAME": "cellar",
        "OTEL_BSP_SCHEDULE_DELAY": "3600000",
    }
    try:
        with serving(tmp_path / "data", "--tracing", environment=environment) as (server, client):
            client.generate("ada", text("Hello"), max_tokens=3)
            assert server.terminate() == 0
    finally:
        collector.stop()
    assert "warmkv.v1.AgentService/Generate" in {span.name for span in collector.spans()}
    assert attributes(collector.received[0].resource_spans[0].resource)["service.name"] == "cellar"


def test_where_nobody_asks_for_traces_nothing_of_it_is_imported(tmp_path: Path) -> None:
    with collecting() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "PYTHONPROFILEIMPORTTIME": "1"}
        with serving(tmp_path / "data", environment=environment) as (server, client):
            client.generate("ada", text("Hello"), max_tokens=3)
            assert server.terminate() == 0
        imported = server.log_text()
    assert "warmkv_server.service.request_log" in imported
    assert "opentelemetry" not in imported
    assert not collector.received
