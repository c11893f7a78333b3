"""A process that does text work, and the one that it is forked from.

Text work is tokenising what clients send, and rendering it with the chat template that came with the model: either can
take any time and any memory, and a thread can't be stopped. So it is done where it can be killed. The first process
loads the tokenizer, once, and computes nothing: those that work are forked from it, in milliseconds. Systems other than
Linux don't take forks well: there each process loads the tokenizer for itself, and works.

All of them end with the server, however it ends.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from warmkv_server.errors import WarmKVError
from warmkv_server.text.loading import load
from warmkv_server.text.schemas import satisfies
from warmkv_server.text.task import (
    ANSWER,
    BROKEN,
    FINDINGS,
    FORK,
    FORKS,
    HEADER,
    LENGTH,
    MEMORY_BYTES,
    NO_MEMORY,
    ORDER,
    REFUSAL,
    TOKENS,
    Task,
    TokenizerSource,
    receive,
    refusal_bytes,
)
from warmkv_server.text.text import Text
from warmkv_server.text.traits import Traits

_PR_SET_PDEATHSIG = 1
_RENEW_BYTES = 96 << 20
"""A process that took more than that for a task makes room for a new one, which has not."""
_WATCH_SECONDS = 0.05


def main(descriptor: int) -> None:
    server = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the server says when it is over
    _end_with(server)
    control = socket.socket(fileno=descriptor)
    source: TokenizerSource | None = receive(control)
    if source is None:
        return
    try:
        tokenizer = load(source.folder, source.chat_template, source.eos_token_ids, source.defaults)
        text = Text(tokenizer, source.vocab_size)
    except BaseException as error:
        _say(control, f"{type(error).__name__}: {error}")
        return
    _say(control, text.bytes_per_token)
    gc.collect()
    if FORKS:
        gc.freeze()  # else looking through it all copies the memory that forks share
        _fork_on_demand(control, text)
    else:
        threading.Thread(target=_watch, args=(server,), daemon=True).start()
        _work(control, text)


def _say(control: socket.socket, value: int | str) -> None:
    said = json.dumps(value).encode()
    control.sendall(LENGTH.pack(len(said)) + said)


def _fork_on_demand(control: socket.socket, text: Text) -> None:
    own = os.getpid()
    workers: dict[int, int] = {}
    while True:
        order, descriptors, _, _ = socket.recv_fds(control, ORDER.size, 1)
        ended = {pid for pid in workers.values() if os.waitpid(pid, os.WNOHANG)[0]}
        workers = {number: pid for number, pid in workers.items() if pid not in ended}
        if not order:
            return  # the workers see it too
        kind, number = ORDER.unpack(order)
        if kind == FORK:
            pid = os.fork()
            if not pid:
                control.close()
                _end_with(own)
                _limit_memory()
                _work(socket.socket(fileno=descriptors[0]), text)
                os._exit(0)
            workers[number] = pid
            os.close(descriptors[0])
        elif number in workers:
            os.kill(workers[number], signal.SIGKILL)
            os.waitpid(workers.pop(number), 0)


def _work(connection: socket.socket, text: Text) -> None:
    """Do tasks until the server is gone, or until this process has grown."""
    before = _most_resident()
    leaving = False
    while not leaving:
        task: Task | None = receive(connection)
        if task is None:
            return
        kind, body = _result(text, task)
        leaving = FORKS and _most_resident() - before > _RENEW_BYTES
        connection.sendall(HEADER.pack(kind, leaving, len(body)) + body)


def _result(text: Text, task: Task) -> tuple[bytes, bytes]:
    try:
        if task.arguments:
            return FINDINGS, json.dumps([satisfies(schema, said) for schema, said in task.arguments]).encode()
        if task.content is None:
            return FINDINGS, json.dumps(text.probe()).encode()
        encoded = text.encode(
            task.content,
            starts=task.starts,
            ending=task.ending,
            held=task.held,
            tail=task.tail,
            answer=task.answer,
            room=task.room,
            setup=task.setup,
            calls=task.calls,
            traits=None if task.traits is None else Traits.of(task.traits),
        )
        head = ANSWER.pack(encoded.replaced, encoded.holds_back, encoded.dated, encoded.thinks)
        return TOKENS, head + encoded.tokens.tobytes()
    except WarmKVError as error:
        return REFUSAL, refusal_bytes(error)
    except MemoryError:
        return NO_MEMORY, b""
    except BaseException:  # what tokenizers raise when they panic is no Exception
        return BROKEN, traceback.format_exc().encode()


def _limit_memory() -> None:
    """Refuse this process more memory than a task may take."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY_BYTES, data + MEMORY_BYTES))
    # Libraries that are refused memory say so before they abort. The server says it too, and better.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_with(parent: int) -> None:
    """Be killed when the parent ends, where the system does that."""
    if FORKS:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _watch(server: int) -> None:
    """End the process with the server, and when it takes too much memory, where the system does neither."""
    before = _most_resident()
    while os.getppid() == server and _most_resident() - before < MEMORY_BYTES:
        time.sleep(_WATCH_SECONDS)
    os._exit(0)


def _most_resident() -> int:
    """Bytes of RAM that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
