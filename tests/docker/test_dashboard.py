"""The dashboard asks for metrics that a server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCKER = Path(__file__).parents[2] / "docker"
METRICS = Path(__file__).parents[2] / "server" / "warmkv_server" / "service" / "metrics.py"


def test_every_metric_of_the_dashboard_is_exposed() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "warmkv.json").read_text())
    asked = {
        name.removesuffix("_total").removesuffix("_bucket").removeprefix("warmkv_")
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"warmkv_\w+", target["expr"])
    }
    assert len(asked) > 15
    source = METRICS.read_text()
    assert sorted(name for name in asked if f'"{name}"' not in source and f'"warmkv_{name}"' not in source) == []


def test_the_image_starts_the_server_with_options_that_exist() -> None:
    from warmkv_server import config

    known = {option.flag for option in config.options()}
    used = {
        flag
        for name in ("Dockerfile", "compose.yaml")
        for line in (DOCKER / name).read_text().splitlines()
        if line.strip().startswith(("CMD", "command:"))
        for flag in re.findall(r'"(--[a-z-]+)"', line)
    }
    assert used
    assert used <= known
