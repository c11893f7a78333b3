"""What starts the server by itself: the image, the units, the manifest."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from warmkv_server import config

ROOT = Path(__file__).parents[2]
CONTRIB = ROOT / "contrib"
FILES = (
    "docker/Dockerfile",
    "docker/compose.yaml",
    "contrib/kubernetes/warmkv.yaml",
    "contrib/systemd/warmkv.service",
    "contrib/launchd/warmkv.server.plist",
)
GRACE_SECONDS = 60
"""More than a server takes to stop: draining, and then as long for a disk."""


def test_they_use_options_that_exist() -> None:
    known = list(config.options())
    flags = {option.flag for option in known} | {"--interval", "--timeout", "--start-period", "--target"}
    variables = {option.variable for option in known}
    for name in FILES:
        text = re.sub(r"^\s*#.*$", "", (ROOT / name).read_text(), flags=re.MULTILINE)
        for line in text.splitlines():
            if "pip" not in line and "useradd" not in line and "COPY" not in line:
                assert set(re.findall(r"(?<![\w!<-])--[a-z][a-z-]+", line)) <= flags, (name, line)
        assert set(re.findall(r"WARMKV_[A-Z_]+", text)) <= variables, name


def test_they_leave_the_server_time_to_stop() -> None:
    manifest = list(yaml.safe_load_all((CONTRIB / "kubernetes" / "warmkv.yaml").read_text()))[1]
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    (unit,) = re.findall(r"TimeoutStopSec=(\d+)", (CONTRIB / "systemd" / "warmkv.service").read_text())
    plist = plistlib.loads((CONTRIB / "launchd" / "warmkv.server.plist").read_bytes())
    told = {
        "kubernetes": manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"],
        "compose": int(compose["services"]["warmkv"]["stop_grace_period"].removesuffix("s")),
        "systemd": int(unit),
        "launchd": plist["ExitTimeOut"],
    }
    assert {name: seconds for name, seconds in told.items() if seconds < GRACE_SECONDS} == {}


def test_the_manifest_is_kubernetes_own() -> None:
    checker = Path(sys.executable).parent / "kubernetes-validate"
    done = subprocess.run(
        [checker, "--strict", CONTRIB / "kubernetes" / "warmkv.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_systemds_own() -> None:
    """But for the program, which isn't installed here."""
    unit = CONTRIB / "systemd" / "warmkv.service"
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    complaints = [
        line for line in done.stderr.splitlines() if "warmkv.service" in line and "is not executable" not in line
    ]
    assert complaints == []
