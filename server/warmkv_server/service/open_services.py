"""What anybody may ask, also while the server loads or drains: health and reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from warmkv_server.errors import Loading, WarmKVError
from warmkv_server.service import inbound
from warmkv_server.service.errors import refuse, status_of
from warmkv_server.service.health import Health
from warmkv_server.service.inbound import RpcContext

Handlers: TypeAlias = "dict[str, grpc.RpcMethodHandler[Any, Any]]"
Reply = Callable[[Any, RpcContext], Awaitable[Message | None]]
Serve = Callable[[object, RpcContext], Awaitable[Message | None]]

_REQUEST_BYTES = 1 << 12
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""Its messages are those of v1alpha on the wire."""


def health_methods(servicer: Health) -> dict[str, Handlers]:
    """The methods of grpc.health.v1.Health."""
    request, write = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse.SerializeToString
    return {
        health.SERVICE_NAME: {
            "Check": grpc.stream_unary_rpc_method_handler(_one(request, servicer.check), response_serializer=write),
            "Watch": grpc.stream_stream_rpc_method_handler(_one(request, servicer.watch), response_serializer=write),
        }
    }


def gateway_health(service: ServiceDescriptor, servicer: Health) -> Handlers:
    """The method HealthCheck of a service that has one of its own: whether the server as a whole serves.

    Where it doesn't the call fails. A gateway that is answered takes the worker in, and asks what its model is once.
    """
    method = service.methods_by_name["HealthCheck"]
    request, response = (GetMessageClass(kind) for kind in (method.input_type, method.output_type))

    async def check(_: Message, __: RpcContext) -> Message:
        if not servicer.serves:
            raise Loading("the server is loading its model, or shutting down; try again", retry_after=1.0)
        return response(healthy=True)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_unary_rpc_method_handler(
        _one(request, check), response_serializer=response.SerializeToString
    )
    return {method.name: handler}


def reflection_methods(services: Iterable[ServiceDescriptor]) -> dict[str, Handlers]:
    """The methods of server reflection, v1alpha and v1, that tell of our services and of gRPC's own."""
    ours = tuple(services)
    names = (*(service.full_name for service in ours), health.SERVICE_NAME, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    service_of = {method.full_name: service.full_name for service in ours for method in service.methods}

    async def by_service(context: RpcContext) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        """Ask for a method's service instead of the method: protobuf's pool finds no file by a method's name."""
        async for request in inbound.read_all(context, reflection_pb2.ServerReflectionRequest, _REQUEST_BYTES):
            if request.file_containing_symbol in service_of:
                request.file_containing_symbol = service_of[request.file_containing_symbol]
            yield request

    async def tell(context: RpcContext) -> None:
        answers: Any = servicer.ServerReflectionInfo(by_service(context), context)
        async for answer in answers:
            await context.write(answer)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        _answering(tell), response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString
    )
    return {name: {"ServerReflectionInfo": handler} for name in (reflection.SERVICE_NAME, _REFLECTION_V1)}


def _one(kind: type[Message], answer: Reply) -> Serve:
    """Serves calls that have one request."""

    async def serve(context: RpcContext) -> Message | None:
        return await answer(await inbound.read(context, kind, _REQUEST_BYTES), context)

    return _answering(serve)


def _answering(serve: Callable[[RpcContext], Awaitable[Message | None]]) -> Serve:
    """Answers with a status that says what is wrong with a request."""

    async def answer(_: object, context: RpcContext) -> Message | None:
        try:
            return await serve(context)
        except WarmKVError as error:
            await refuse(context, status_of(error))
        except grpc.aio.InternalError:
            inbound.gone()
        return None

    return answer
