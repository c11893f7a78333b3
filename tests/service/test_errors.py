"""Every error has a code, and its details fit into a status."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from warmkv_server import errors
from warmkv_server.service.errors import CODES, DOMAIN, status_of


def all_errors() -> list[type[errors.WarmKVError]]:
    return errors.WarmKVError.__subclasses__()


def details_of(error: errors.WarmKVError) -> status_pb2.Status:
    ((key, value),) = status_of(error).trailing_metadata
    assert key == "grpc-status-details-bin"
    return status_pb2.Status.FromString(value)


def test_every_error_has_a_code() -> None:
    assert set(CODES) == set(all_errors())


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_the_details_repeat_code_and_message_and_give_the_reason(kind: type[errors.WarmKVError]) -> None:
    error = kind("what is wrong")
    status, details = status_of(error), details_of(error)
    assert details.code == status.code.value[0]
    assert details.message == status.message
    info = error_details_pb2.ErrorInfo()
    assert details.details[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, kind.reason)


def test_a_time_to_come_back_is_in_the_details() -> None:
    retry = error_details_pb2.RetryInfo()
    assert details_of(errors.QueueFull("full", retry_after=1.5)).details[1].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() == 1_500_000_000
    assert len(details_of(errors.QueueFull("full")).details) == 1


def test_many_violations_are_cut_with_their_number() -> None:
    violations = [errors.Violation("field" * 50, "wrong " * 100)] * 1000
    error = errors.InvalidField("ü" * 10_000, violations=violations)
    status = status_of(error)
    assert len(status.message) == 300
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(status.trailing_metadata[0][1]) < 4000
    bad = error_details_pb2.BadRequest()
    assert details_of(error).details[1].Unpack(bad)
    told = len(bad.field_violations) - 1
    assert told > 3
    assert bad.field_violations[-1].description == f"{1000 - told} more fields are wrong"
