"""The committed stubs are what the contract generates, complete, and light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from warmkv import v1
from warmkv.v1 import agent_service_pb2, server_service_pb2

ROOT = Path(__file__).parents[2]


def test_committed_stubs_are_generated_from_the_contract() -> None:
    check = subprocess.run([sys.executable, ROOT / "tools/stubs.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_package_exports_every_name_of_the_contract() -> None:
    for module in (agent_service_pb2, server_service_pb2):
        contract = module.DESCRIPTOR
        names = {*contract.message_types_by_name, *contract.enum_types_by_name}
        names |= {value for enum in contract.enum_types_by_name.values() for value in enum.values_by_name}
        names |= {f"{service}Stub" for service in contract.services_by_name}
        assert names <= set(v1.__all__)
        for name in contract.message_types_by_name:
            assert issubclass(getattr(v1, name), Message)


async def test_stubs_accept_asyncio_channels() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        call = v1.AgentServiceStub(channel).Generate(v1.GenerateRequest(content=v1.Content(text="x")))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(call))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_import_loads_nothing_but_grpc_and_protobuf() -> None:
    # What grpc and protobuf load by themselves is their matter; everything on top has to be the stubs' own.
    program = (
        "import sys, grpc, grpc.aio\n"
        "before = set(sys.modules)\n"
        "import warmkv.v1\n"
        "print('\\n'.join(set(sys.modules) - before))\n"
    )
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    foreign = {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign
    assert {name for name in foreign if not name.startswith(("warmkv", "grpc", "google"))} == set()
    assert {name for name in foreign if name.startswith(("warmkv_server", "warmkv_bench"))} == set()
