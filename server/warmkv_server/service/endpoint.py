"""The way of every call: read, identify, admit, serve, and answer with a status that says what went wrong."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from warmkv import ROUTING_KEY, agent_of
from warmkv_server.agents.agents import Agents
from warmkv_server.agents.run import internal_error
from warmkv_server.agents.stages import Stages
from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.settings import Settings
from warmkv_server.errors import InvalidField, WarmKVError
from warmkv_server.service import inbound
from warmkv_server.service.auth import Auth, Metadata, Principal
from warmkv_server.service.errors import refuse, status_of
from warmkv_server.service.gate import Gate
from warmkv_server.service.inbound import RpcContext
from warmkv_server.service.metrics import Metrics
from warmkv_server.service.request_log import Asked, RequestLog
from warmkv_server.service.validate import Model
from warmkv_server.service.wire import refusal

if TYPE_CHECKING:
    from warmkv_server.service.tracing import Tracing  # which needs packages that need not be there


@dataclass(frozen=True)
class Call:
    """One call that was let in.

    Attributes:
        stages: what its request goes through, from when it had come in.
        closing: set once the server waits for its calls to end.
    """

    agents: Agents
    principal: Principal
    context: RpcContext
    asked: Asked
    stages: Stages = field(default_factory=Stages)
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, message: Message) -> None:
        """Send the next message of a stream."""
        self.asked.last = message
        await self.context.write(message)

    @property
    def model(self) -> Model:
        """What requests are checked against."""
        info = self.agents.engine.info
        return Model(info.vocab_size, info.context_limit)

    def key(self, agent_id: str) -> AgentKey:
        """The agent that the caller means.

        Raises:
            AgentForbidden
        """
        self.principal.require(agent_id)
        return AgentKey(self.principal.tenant, agent_id)


Behaviour = Callable[[Any, Call], Awaitable[Message | None]]
"""Serves one RPC: answers a message, or None if it has sent a stream."""


@dataclass(frozen=True)
class Endpoints:
    """Makes gRPC handlers out of servicers."""

    gate: Gate
    auth: Auth
    metrics: Metrics
    settings: Settings
    requests: RequestLog = field(default_factory=RequestLog)
    tracing: Tracing | None = None

    def handlers(
        self, service: ServiceDescriptor, servicer: object, leave_out: Container[str] = ()
    ) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Handlers of a service's methods; the servicer has a method in snake_case for each RPC.

        Args:
            leave_out: RPCs that are served otherwise.
        """
        return {
            method.name: self._handler(method, getattr(servicer, _snake(method.name)))
            for method in service.methods
            if method.name not in leave_out
        }

    def _handler(self, method: MethodDescriptor, behaviour: Behaviour) -> grpc.RpcMethodHandler[Any, Any]:
        # To gRPC all requests are streams: it reads those of one message before it says that a call is there.
        stream = method.server_streaming
        make = grpc.stream_stream_rpc_method_handler if stream else grpc.stream_unary_rpc_method_handler
        kind = GetMessageClass(method.input_type)

        async def serve(_: object, context: RpcContext) -> Message | None:
            return await self._serve(method, kind, behaviour, context)

        return make(serve, response_serializer=GetMessageClass(method.output_type).SerializeToString)

    async def _serve(
        self, method: MethodDescriptor, kind: type[Message], behaviour: Behaviour, context: RpcContext
    ) -> Message | None:
        name, code, reason = method.name, grpc.StatusCode.CANCELLED, ""
        asked = Asked(name, context.peer(), service=method.containing_service.full_name)
        try:
            response = await self._admit(asked, kind, behaviour, context)
            code = grpc.StatusCode.OK
            return response
        except WarmKVError as error:
            status, reason = status_of(error), error.reason
            code = status.code
        except asyncio.CancelledError:
            if _is_cancelled():
                raise  # by gRPC: the client is gone, or its deadline is
            broken = internal_error(name)
            status, reason = status_of(broken), broken.reason
            code = status.code
        except grpc.aio.InternalError:
            inbound.gone()
        except Exception:
            broken = internal_error(name)
            status, reason = status_of(broken), broken.reason
            code = status.code
        finally:
            asked.seconds = time.perf_counter() - asked.began
            self.metrics.served(name, code.name, asked.seconds)
            # The answer doesn't wait for the log.
            loop = asyncio.get_running_loop()
            loop.call_soon(self.requests.ended, asked, code, reason)
            if self.tracing is not None:
                loop.call_soon(self.tracing.ended, asked, code, reason)
        await refuse(context, status)
        return None

    async def _admit(
        self, asked: Asked, kind: type[Message], behaviour: Behaviour, context: RpcContext
    ) -> Message | None:
        """Serve a call; the request of one that is not let in is not even read."""
        metadata: Metadata = context.invocation_metadata() or ()
        if self.tracing is not None:
            asked.caller = self.tracing.caller(metadata)
        principal = self.auth.identify(metadata)
        asked.tenant = principal.tenant
        self.gate.check()
        request = await inbound.read(
            context, kind, self.settings.max_message_bytes, lambda data: refusal(data, kind, self.gate.text_bytes)
        )
        asked.request = request
        with self.gate.enter() as agents:
            _check_routing(request, metadata)
            call = Call(agents, principal, context, asked, closing=self.gate.closing)
            asked.stages = call.stages
            response = await behaviour(request, call)
            if response is not None:
                asked.last = response
            return response


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _check_routing(request: Any, metadata: Metadata) -> None:
    """A router that hashes this metadata must have hashed the agent that the request is about."""
    routed = {value for key, value in metadata if key == ROUTING_KEY}
    if routed and (agent_id := agent_of(request)) is not None and routed != {agent_id}:
        raise InvalidField.of("agent_id", f"is not what the metadata {ROUTING_KEY} says; the two have to be equal")


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
