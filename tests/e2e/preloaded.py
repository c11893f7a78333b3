"""Processes of `warmkv` that are forked from one that has imported transformers and gRPC already.

That takes seconds of each start. Each is the whole command line in a process of its own. What this leaves out, how a
process begins from nothing, is for the tests that start `warmkv` itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

MESSAGE = 1 << 17


class Process:
    """As much of subprocess.Popen as tests use.

    Args:
        told: has the process id in it, and behind it the exit status.
    """

    def __init__(self, told: socket.socket, stdout: IO[str]) -> None:
        self._told = told
        self._status: int | None = None
        self.pid = int(told.recv(64))
        self.stdout = stdout

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("warmkv", timeout or 0)
            self._status = int(self._told.recv(64))
            self._told.close()
        return self._status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: Sequence[str], environment: Mapping[str, str], stderr: int) -> Process:
    """Start `warmkv` with these arguments."""
    out, stdout = os.pipe()
    told, tell = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with tell:
        order = json.dumps([list(arguments), dict(environment), str(Path.cwd()), files]).encode()
        socket.send_fds(_first(), [order], [stdout, stderr, tell.fileno()])
    os.close(stdout)
    return Process(told, os.fdopen(out))


def run(arguments: Sequence[str], environment: Mapping[str, str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run `warmkv` with these arguments to its end, which it has to reach within so many seconds; as subprocess.run."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = start(arguments, environment, stderr.fileno())
        late = threading.Timer(seconds, process.kill)
        late.start()
        with process.stdout:
            stdout = process.stdout.read()
        status = process.wait(seconds)
        late.cancel()
        stderr.seek(0)
        return subprocess.CompletedProcess(["warmkv", *arguments], status, stdout, stderr.read())


@functools.cache
def _first() -> socket.socket:
    """The connection to the process that others are forked from; it ends with this one."""
    control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        first = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())], pass_fds=[other.fileno()], stdout=subprocess.DEVNULL
        )
    atexit.register(first.wait)
    atexit.register(control.close)
    return control


def _serve(control: socket.socket) -> None:
    """Fork for each order, and tell of each process when it has begun and when it has ended. Returns in a fork."""
    tells: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 512)
            for pid in list(tells):
                if (status := _status(pid)) is not None:
                    with tells.pop(pid) as tell:
                        tell.send(b"%d" % status)
        if control.fileno() not in ready:
            continue
        order, descriptors, _, _ = socket.recv_fds(control, MESSAGE, 3)
        if not order:
            sys.exit()
        stdout, stderr, tell = descriptors[0], descriptors[1], socket.socket(fileno=descriptors[2])
        if pid := os.fork():
            tells[pid] = tell
            tell.send(b"%d" % pid)
            os.close(stdout)
            os.close(stderr)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for descriptor in (stdout, stderr, woken, wake):
            os.close(descriptor)
        for end in (control, tell, *tells.values()):
            end.close()
        arguments, environment, folder, files = json.loads(order)
        sys.argv[1:] = arguments
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_NOFILE, tuple(files))
        return


def _status(pid: int) -> int | None:
    """As Popen.returncode."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


if __name__ == "__main__":
    from warmkv_server.main import main
    from warmkv_server.text.process import without_mlx

    with without_mlx():
        import warmkv_server.text.work  # noqa: F401
    for name in (
        "warmkv_server.cli.main",
        "grpc.aio",
        "grpc_health.v1.health_pb2_grpc",
        "grpc_reflection.v1alpha.reflection",
        "prometheus_client",
        "warmkv.v1",
    ):
        importlib.import_module(name)

    gc.collect()
    gc.freeze()  # else each process looks through all of it, and copies it

    assert "mlx" not in sys.modules, "a server that has MLX can't fork its process for text"

    _serve(socket.socket(fileno=int(sys.argv[1])))
    main()
