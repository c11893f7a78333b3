"""Where a run took place: machine, versions, model and source, as far as they can move a number."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from warmkv import v1 as pb

CLIENT_PACKAGES = ("warmkv", "grpcio", "protobuf", "numpy", "matplotlib")


def environment(info: pb.GetServerInfoResponse, data_dir: Path | None, arguments: list[str] | None) -> dict[str, Any]:
    """Describes this machine, the source tree, and the server as GetServerInfo does.

    Args:
        data_dir: the server's data directory, where the benchmark started the server.
        arguments: the arguments of `warmkv serve`; None if the server was running already.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": memory_bytes(),
            "load_average": load_average(),
            "data_filesystem": None if data_dir is None else filesystem(data_dir),
        },
        "client": {
            "python": platform.python_version(),
            "packages": {name: found for name in CLIENT_PACKAGES if (found := _version(name))},
            "commit": commit(),
        },
        "server": {
            "started_by_benchmark": arguments is not None,
            "arguments": arguments,
            **MessageToDict(info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
        },
    }


def model_note(environment: dict[str, Any]) -> str | None:
    """What a reader must know of the model before its numbers: random weights answer noise. None otherwise."""
    server = environment["server"]
    if server.get("model_kind") != pb.ModelKind.Name(pb.MODEL_KIND_RANDOM):
        return None
    return f"{server['model_id']} is noise: random weights in a model's shape. Only timings and sizes mean anything."


def processor() -> str:
    """The processor's name as its maker writes it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        named = _output("sysctl", "-n", "machdep.cpu.brand_string")
        return named or platform.machine()


def memory_bytes() -> int | None:
    """Installed RAM."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes: what else the machine is doing."""
    return [round(value, 2) for value in os.getloadavg()]


def filesystem(path: Path) -> str | None:
    """Type of the file system that holds a path, such as "ext4" or "apfs"."""
    if platform.system() == "Darwin":
        mounts = _output("mount") or ""
        found = [
            (line.split(" on ", 1)[1].split(" (", 1)[0], line.split("(", 1)[1].split(",", 1)[0])
            for line in mounts.splitlines()
            if " on " in line and "(" in line
        ]
    else:
        try:
            found = [(fields[1], fields[2]) for fields in map(str.split, Path("/proc/mounts").read_text().splitlines())]
        except OSError:
            return None
    holding = [(mount, kind) for mount, kind in found if path.resolve().is_relative_to(mount)]
    return max(holding, key=lambda entry: len(entry[0]))[1] if holding else None


def commit() -> str | None:
    """The commit of the source tree that this file is part of, marked when files differ from it."""
    here = str(Path(__file__).resolve().parent)
    head = _output("git", "-C", here, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + (" with local changes" if _output("git", "-C", here, "status", "--porcelain", "-uno") else "")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
