"""`warmkv fleet envoy`: what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from typer.testing import CliRunner

from warmkv_server.cli.main import app

SERVERS = ("--server", "a=10.0.0.1:50051", "--server", "b=10.0.0.2:50051")


def write(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["fleet", "envoy", "--out", str(folder), *arguments])


def endpoints(assignment: Any) -> dict[str, tuple[str, int, str]]:
    """Address, port and state of each server by its name."""
    found = {}
    for each in assignment["endpoints"][0]["lb_endpoints"]:
        at = each["endpoint"]["address"]["socket_address"]
        name = each["metadata"]["filter_metadata"]["envoy.lb"]["hash_key"]
        found[name] = (at["address"], at["port_value"], each["health_status"])
    return found


def test_the_list_of_servers_is_a_file_that_is_replaced(tmp_path: Path) -> None:
    assert write(tmp_path, *SERVERS).exit_code == 0
    first = yaml.safe_load((tmp_path / "endpoints.yaml").read_text())["resources"][0]
    assert endpoints(first) == {"a": ("10.0.0.1", 50051, "UNKNOWN"), "b": ("10.0.0.2", 50051, "UNKNOWN")}
    configuration = (tmp_path / "envoy.yaml").read_text()
    assert write(tmp_path, *SERVERS, "--server", "[::1]:7", "--draining", "a").exit_code == 0
    second = yaml.safe_load((tmp_path / "endpoints.yaml").read_text())["resources"][0]
    assert endpoints(second)["a"][2] == "DRAINING"
    assert endpoints(second)["[::1]:7"] == ("::1", 7, "UNKNOWN")
    assert (tmp_path / "envoy.yaml").read_text() == configuration  # so that a running Envoy has all of it
    assert {path.name for path in tmp_path.iterdir()} == {"endpoints.yaml", "envoy.yaml", "warmkv.pb"}


def test_servers_that_have_names_are_looked_up_by_envoy(tmp_path: Path) -> None:
    assert write(tmp_path, "--server", "warmkv-0.warmkv:50051", "--server", "warmkv-1.warmkv:50051").exit_code == 0
    (cluster,) = yaml.safe_load((tmp_path / "envoy.yaml").read_text())["static_resources"]["clusters"]
    assert cluster["type"] == "STRICT_DNS"
    assert endpoints(cluster["load_assignment"])["warmkv-1.warmkv:50051"][0] == "warmkv-1.warmkv"
    assert not (tmp_path / "endpoints.yaml").exists()


def test_every_request_that_names_an_agent_is_led_by_it(tmp_path: Path) -> None:
    write(tmp_path, *SERVERS)
    (listener,) = yaml.safe_load((tmp_path / "envoy.yaml").read_text())["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (extraction,) = [each["typed_config"] for each in filters if each["name"].endswith("grpc_field_extraction")]
    fields = {
        method: [*said["request_field_extractions"]] for method, said in extraction["extractions_by_method"].items()
    }
    assert fields["warmkv.v1.AgentService.Generate"] == ["agent_id"]
    assert fields["warmkv.v1.AgentService.UpdateAgent"] == ["agent.agent_id"]
    assert fields["warmkv.v1.ServerService.CountTokens"] == ["agent_id"]
    described = FileDescriptorSet.FromString((tmp_path / "warmkv.pb").read_bytes())
    methods = {
        f"{file.package}.{service.name}.{method.name}"
        for file in described.file
        for service in file.service
        for method in service.method
    }
    assert methods - {*fields} == {
        "warmkv.v1.AgentService.ListAgents",
        "warmkv.v1.ServerService.GetServerInfo",
        "warmkv.v1.ServerService.GetServerStats",
    }
    assert "google/rpc/error_details.proto" in {file.name for file in described.file}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--server", "10.0.0.1"), "'10.0.0.1' is no address"),
        (("--server", "a=10.0.0.1:99999"), "is no address"),
        (("--server", "=10.0.0.1:5"), "no name before the '='"),
        (("--server", "a=10.0.0.1:5", "--server", "a=10.0.0.2:5"), "two servers are called a"),
        ((*SERVERS, "--draining", "c"), "--draining c is the name of no --server"),
        ((*SERVERS, "--listen", "0.0.0.0:50050"), "without TLS"),
        ((*SERVERS, "--tls-cert", "x.pem"), "need each other"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = write(tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_tls_on_both_sides(tmp_path: Path) -> None:
    flags = ("--tls-cert", "own.pem", "--tls-key", "own.key", "--server-ca", "ca.pem", "--listen", "0.0.0.0:443")
    assert write(tmp_path, *SERVERS, *flags).exit_code == 0
    resources = yaml.safe_load((tmp_path / "envoy.yaml").read_text())["static_resources"]
    down = resources["listeners"][0]["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    assert down["tls_certificates"][0]["private_key"]["filename"].endswith("/own.key")
    up = resources["clusters"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    assert up["validation_context"]["trusted_ca"]["filename"].endswith("/ca.pem")
