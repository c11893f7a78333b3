"""The dashboard and the alerts ask for what a server tells, and every metric is explained to operators."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import Client, free_port, serving, some_tokens, token_ids

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TOKEN = "a" * 32

Series = dict[str, list[dict[str, str]]]
"""The labels of each series, by its name."""


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """Of a server with tenants that has served one of them."""
    folder, port, found = tmp_path_factory.mktemp("server"), free_port(), Series()
    (folder / "tokens").write_text(f"red {TOKEN}\n")
    flags = ("--metrics-port", str(port), "--token-file", str(folder / "tokens"))
    with serving(folder / "data", *flags) as (server, _), Client(server.address, token=TOKEN) as client:
        client.prime("a", token_ids(some_tokens(20)))
        client.generate("a")
        with pytest.raises(grpc.RpcError):
            client.get("nobody")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            for family in text_string_to_metric_families(response.read().decode()):
                for sample in family.samples:
                    found.setdefault(sample.name, []).append(sample.labels)
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Each with the title of what asks it."""
    for panel in json.loads((DOCKER / "grafana" / "dashboards" / "warmkv.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")
    for group in yaml.safe_load((DOCKER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def selectors(expression: Any) -> Iterator[Any]:
    """The series that an expression of PromQL selects."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for part in ("expr", "lhs", "rhs", "args", "vector_selector"):
        found = getattr(expression, part, None)
        for each in found if isinstance(found, list) else [found] if found is not None else []:
            yield from selectors(each)


@pytest.mark.parametrize(
    ("title", "query"), [pytest.param(*each, id=f"{n}-{each[0]}") for n, each in enumerate(queries())]
)
def test_every_query_selects_series_that_a_server_tells(title: str, query: str, scraped: Series) -> None:
    asked = list(selectors(promql_parser.parse(query)))
    assert asked, title
    grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
    for selector in asked:
        matchers = selector.matchers.matchers
        assert any(
            {*grouped, *(matcher.name for matcher in matchers)} <= set(labels) for labels in scraped[selector.name]
        ), (title, selector.name)
        for matcher in matchers:
            if matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.Re):
                values = [labels[matcher.name] for labels in scraped[selector.name]]
                assert matcher.name == "code" or any(re.fullmatch(matcher.value, value) for value in values), title


def test_every_metric_is_explained_to_operators(scraped: Series) -> None:
    told = (ROOT / "docs" / "operations.md").read_text()
    told_of = [name for name in scraped if name.startswith("warmkv_") and not name.endswith("_created")]
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told_of}
    assert len(names) > 40
    assert sorted(name for name in names if f"`{name}`" not in told and f"`{name}{{" not in told) == []


def test_every_alert_is_explained_to_operators() -> None:
    told = (ROOT / "docs" / "operations.md").read_text()
    rules = yaml.safe_load((DOCKER / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in told] == []


def test_what_can_be_counted_is_told_from_the_start(scraped: Series) -> None:
    """Else the first error of a kind can't be seen to increase."""
    sources = {"cold", "shared", "warm", "hot"}
    assert {labels["source"] for labels in scraped["warmkv_requests_total"]} == sources
    assert {labels["source"] for labels in scraped["warmkv_first_token_seconds_count"]} == sources
    assert {"checksum", "missing_block"} <= {labels["reason"] for labels in scraped["warmkv_fallbacks_total"]}
    assert scraped["warmkv_tenant_requests_total"] == [{"tenant": "red"}]
    assert "process_resident_memory_bytes" in scraped
