"""The one thread that computes with MLX: it loads the model, prefills, decodes, and sends events back.

Elsewhere MLX is memory: the store's threads make arrays out of files, and look into them. Arrays that pass from one
thread to another are evaluated.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx

from warmkv_server.engine import device
from warmkv_server.engine.decode import Decoder
from warmkv_server.engine.model import LoadedModel
from warmkv_server.engine.need import Needs
from warmkv_server.engine.pace import Pace
from warmkv_server.engine.prefill import Prefiller
from warmkv_server.engine.roster import Deliver, Roster
from warmkv_server.engine.schedule import Schedule, together
from warmkv_server.engine.sequence import Sequence
from warmkv_server.engine.speculate import Speculator
from warmkv_server.engine.types import EngineStats, Finish, Job, Started
from warmkv_server.errors import Draining
from warmkv_server.malloc import give_back

REST_SECONDS = 30.0
"""Without work, after which memory that is kept for the next request goes back to the system."""

_FREED = 4
"""Freed memory that is kept for the next step is at most this part of what requests may take."""


@dataclass(frozen=True)
class Submit:
    ident: int
    job: Job
    time: float


@dataclass(frozen=True)
class Cancel:
    ident: int


class Stop:
    """Ends the thread after the commands before it."""


Command = Submit | Cancel | Stop


class StepLoop:
    """Runs commands and steps until it is told to stop.

    Args:
        load: makes the model, on this thread.
        deliver: takes the events.
        relieve: called on this thread when memory has run out; lets go, elsewhere, of what can be spared.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        deliver: Deliver,
        relieve: Callable[[], None],
        *,
        max_batch: int,
        prefill_chunk: int,
        short_prompt: int | None,
        max_decode_gap: float,
        inflight_bytes: int,
        speculate_tokens: int,
    ) -> None:
        self._load = load
        pace = Pace(prefill_chunk or device.prefill_chunk(), max_decode_gap, device.smallest_chunk())
        short = device.short_prompt() if short_prompt is None else short_prompt
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._schedule = Schedule(max_batch, inflight_bytes)
        self._roster = Roster(self._schedule, deliver, relieve)
        self._decoder = Decoder(self._roster, max_batch)
        self._prefiller = Prefiller(self._roster, self._decoder, pace, short)
        self._speculate_tokens = speculate_tokens
        self._thread = threading.Thread(target=self._main, name="mlx", daemon=True)
        self.loaded: LoadedModel | None = None
        self.needs: Needs | None = None
        self.failure: BaseException | None = None
        self.ready = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Command) -> None:
        """From any thread."""
        self._commands.put(command)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @property
    def decoding(self) -> bool:
        """Whether somebody decodes. From any thread."""
        return bool(self._roster.groups)

    def stats(self) -> EngineStats:
        """From any thread."""
        speculator = self._decoder.speculator
        return EngineStats(
            queue_depth=len(self._schedule.waiting),
            prefilling=len(self._schedule.prefilling),
            decoding=sum(len(group.sequences) for group in list(self._roster.groups)),
            batch_size=self._decoder.rows,
            prefilled_tokens=self._prefiller.prefilled,
            decoded_tokens=self._decoder.decoded,
            proposed_tokens=speculator.proposed if speculator else 0,
            accepted_tokens=speculator.accepted if speculator else 0,
            in_flight_bytes=together([sequence.need for sequence in self._roster.running()]),
        )

    def _main(self) -> None:
        with ExitStack() as limits:
            if self._begin(limits):
                self._serve()
            # Streams left to the interpreter's end abort the process now and then.
            mx.clear_streams()

    def _begin(self, limits: ExitStack) -> bool:
        """Load the model. Whether that went well."""
        try:
            device.prepare()
            limits.enter_context(device.limited(self._schedule.budget // _FREED))
            self.loaded = self._load()
            self.needs = Needs.on(self.loaded, self._prefiller.pace.chunk)
            if self._speculate_tokens:
                self._decoder.speculator = Speculator(self._speculate_tokens, self.loaded)
        except BaseException as error:
            self.failure = error
            return False
        finally:
            self.ready.set()
        return True

    def _serve(self) -> None:
        while self._take_commands():
            self._admit()
            if self._schedule.prefilling:
                self._roster.flush()
            self._prefiller.step()
            if self._prefiller.lets_decode():
                self._decoder.step()
            if not self._roster.groups:
                self._roster.flush()  # else the next step does, once it is under way
        for sequence in list(self._roster.sequences.values()):
            self._roster.forget(sequence)
            self._roster.send(sequence.ident, Draining("the server is shutting down"))
        self._roster.flush()
        mx.synchronize()

    def _take_commands(self) -> bool:
        idle = not self._roster.sequences
        if idle:
            self._decoder.rows = 0
            mx.clear_cache()  # give the memory of what has just ended back to the system
        while True:
            try:
                command = self._commands.get(block=idle, timeout=REST_SECONDS)
            except queue.Empty:
                if not idle:
                    return True
                give_back()
                continue
            idle = False
            match command:
                case Submit(ident, job, submitted):
                    assert self.loaded is not None
                    assert self.needs is not None
                    sequence = Sequence(ident, job, self.loaded, self.needs.of_job(job), submitted=submitted)
                    self._roster.add(sequence)
                case Cancel(ident):
                    self._cancel(ident)
                case Stop():
                    return False

    def _admit(self) -> None:
        while self._schedule.waiting:
            sequence = self._schedule.admit(self._roster.running())
            if sequence is None:
                return
            if not sequence.rewound:
                self._roster.send(sequence.ident, Started(time.perf_counter() - sequence.submitted))
            with self._roster.containing(sequence):
                sequence.opening = sequence.open()

    def _cancel(self, ident: int) -> None:
        """Between two steps, once every token that was sent has its KV computed or in flight."""
        sequence = self._roster.sequences.get(ident)
        if sequence is not None and sequence.sent:
            self._decoder.step()  # its first token waits for others' prefill
        if sequence is None or ident not in self._roster.sequences:
            return
        sequence.finish = Finish.CANCELLED
        self._decoder.release(sequence)
        if ident in self._roster.sequences:
            with self._roster.containing(sequence):
                self._roster.finish(sequence)
