"""What a request is told of the cache."""

from __future__ import annotations

import pytest

from warmkv_server.agents.types import CacheReport
from warmkv_server.contract.kv import Reuse, Source


@pytest.mark.parametrize(
    ("shared", "prompt", "source"),
    [
        (0, 10, Source.COLD),
        (1, 10, Source.COLD),
        (3, 10, Source.SHARED),
        (255, 2000, Source.COLD),
        (256, 2000, Source.SHARED),
    ],
)
def test_little_of_others_kv_is_counted_and_still_cold(shared: int, prompt: int, source: Source) -> None:
    report = CacheReport.of(Reuse(length=shared, shared_tokens=shared), prompt)
    assert (report.source, report.cached_tokens) == (source, shared)
