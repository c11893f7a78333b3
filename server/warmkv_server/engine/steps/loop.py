"""The step loop, on the one thread that computes with MLX: loads the model, prefills, decodes, and sends events back.

Elsewhere MLX is memory: the store's threads make arrays out of files, and look into them. Arrays that pass from one
thread to another are evaluated.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx

from warmkv_server.contract.generation import EngineStats, Finish, Job, Started
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.model import device
from warmkv_server.engine.model.load import LoadedModel
from warmkv_server.engine.model.memory_need import MemoryNeeds
from warmkv_server.engine.output.constraint import Constraint
from warmkv_server.engine.steps.decode import Decoder
from warmkv_server.engine.steps.prefill import Pace, Prefiller
from warmkv_server.engine.steps.running_set import Deliver, RunningSet
from warmkv_server.engine.steps.schedule import Schedule, together
from warmkv_server.engine.steps.sequence import Sequence
from warmkv_server.engine.steps.speculate import Speculator
from warmkv_server.errors import Draining, EngineError
from warmkv_server.platform.malloc import give_back

log = logging.getLogger(__name__)

REST_SECONDS = 30.0
"""Without work, after which memory that is kept for the next request goes back to the system."""

_FREED = 4
"""Freed memory that is kept for the next step is at most this part of what requests may take."""


SOON_SECONDS = 60.0
"""A failure so soon after another is the last: what fails like this would go on failing."""


@dataclass(frozen=True)
class Failed:
    """The loop broke where nothing contains it, and everything in flight has ended with this id.

    Attributes:
        for_good: whether nothing runs any more.
    """

    error_id: str
    for_good: bool


class Restarted:
    """A new loop takes the place of one that broke."""


News = Failed | Restarted


@dataclass(frozen=True)
class Submit:
    ident: int
    job: Job
    constraint: Constraint | None
    time: float


@dataclass(frozen=True)
class Cancel:
    ident: int


class Stop:
    """Ends the thread after the commands before it."""


Command = Submit | Cancel | Stop


class StepLoop:
    """Runs commands and steps until it is told to stop.

    What breaks a sequence ends that sequence: see `RunningSet.containing`. What breaks the loop itself ends everything
    in flight; then a new loop begins on the same thread and model, unless the last one has broken just before.

    Args:
        load: makes the model, on this thread.
        deliver: takes the events.
        relieve: called on this thread when memory has run out; lets go, elsewhere, of what can be spared.
        tell: called on this thread when the loop has broken, and when the next one begins.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        deliver: Deliver,
        relieve: Callable[[], None],
        tell: Callable[[News], None],
        settings: Settings,
    ) -> None:
        self._load = load
        self._deliver = deliver
        self._relieve = relieve
        self._tell = tell
        self._settings = settings
        self._pace = (
            settings.prefill_chunk or device.prefill_chunk(),
            settings.max_decode_gap_ms / 1000,
            device.smallest_chunk(),
        )
        self._short_prompt = device.short_prompt()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._preempted = 0
        self._build()
        self._thread = threading.Thread(target=self._main, name="mlx", daemon=True)
        self.loaded: LoadedModel | None = None
        self.needs: MemoryNeeds | None = None
        self.failure: BaseException | None = None
        self.ready = threading.Event()

    def _build(self) -> None:
        """Make everything that a step needs besides the model, with nothing in it."""
        self._schedule = Schedule(self._settings.max_batch, self._settings.inflight_bytes)
        self._running = RunningSet(self._schedule, self._deliver, self._relieve)
        self._decoder = Decoder(self._running, self._settings.max_batch)
        self._prefiller = Prefiller(self._running, self._decoder, Pace(*self._pace), self._short_prompt)

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
        return bool(self._running.batches)

    def stats(self) -> EngineStats:
        """From any thread."""
        speculator = self._decoder.speculator
        return EngineStats(
            queue_depth=len(self._schedule.waiting),
            prefilling=len(self._schedule.prefilling),
            decoding=sum(len(batch.sequences) for batch in list(self._running.batches)),
            batch_size=self._decoder.rows,
            prefilled_tokens=self._prefiller.prefilled,
            decoded_tokens=self._decoder.decoded,
            proposed_tokens=speculator.proposed if speculator else 0,
            accepted_tokens=speculator.accepted if speculator else 0,
            in_flight_bytes=together([sequence.need for sequence in self._running.admitted()])
            + sum(sequence.parked_bytes for sequence in self._schedule.parked()),
            preempted=self._preempted,
        )

    def _main(self) -> None:
        with ExitStack() as limits:
            if self._begin(limits):
                self._supervise()
            # Streams left to the interpreter's end abort the process now and then.
            mx.clear_streams()

    def _begin(self, limits: ExitStack) -> bool:
        """Load the model. Whether that went well."""
        try:
            device.prepare()
            limits.enter_context(device.limited(self._schedule.budget // _FREED))
            self.loaded = self._load()
            self.needs = MemoryNeeds.on(self.loaded, self._prefiller.pace.chunk)
            self._decoder.speculator = self._new_speculator()
        except BaseException as error:
            self.failure = error
            return False
        finally:
            self.ready.set()
        return True

    def _new_speculator(self) -> Speculator | None:
        assert self.loaded is not None
        most, force = self._settings.speculate_tokens, self._settings.force_tokens
        return Speculator(most, force, self.loaded) if most or force else None

    def _supervise(self) -> None:
        """Serve, also after it broke once."""
        broke = -SOON_SECONDS
        for_good = False
        while not for_good:
            try:
                self._serve()
                return
            except BaseException:
                before, broke = broke, time.perf_counter()
                for_good = self._fail_all(for_good=broke - before < SOON_SECONDS)
            try:  # outside the handler: the exception's frames hold arrays
                if not for_good:
                    self._build_anew()
                    self._tell(Restarted())
            except BaseException:
                for_good = self._fail_all(for_good=True)

    def _fail_all(self, for_good: bool) -> bool:
        """End whatever was sent to this thread, inside an exception's handler. Whether nothing can go on."""
        error_id = secrets.token_hex(6)
        what = "it has failed just before, and stops" if for_good else "it begins anew"
        log.error("engine error %s: the engine has failed; %s", error_id, what, exc_info=True)
        try:
            for ident in [*self._running.sequences, *self._take_back()]:
                self._running.send(ident, EngineError(error_id))
            self._running.flush()
        except BaseException:
            log.exception("engine error %s: what was running can't be told; the engine stops", error_id)
            for_good = True
        self._tell(Failed(error_id, for_good))
        return for_good

    def _take_back(self) -> list[int]:
        """Those that were sent and that nobody has looked at yet."""
        commands = []
        while not self._commands.empty():
            commands.append(self._commands.get())
        for command in commands:
            if isinstance(command, Stop):
                self._commands.put(command)
        return [command.ident for command in commands if isinstance(command, Submit)]

    def _build_anew(self) -> None:
        """Go on with the model alone; what was counted goes on being counted."""
        decoder, prefiller = self._decoder, self._prefiller
        self._build()
        mx.synchronize()
        mx.clear_cache()
        self._decoder.decoded, self._prefiller.prefilled = decoder.decoded, prefiller.prefilled
        self._decoder.speculator = speculator = self._new_speculator()
        if speculator is not None and decoder.speculator is not None:
            speculator.proposed, speculator.accepted = decoder.speculator.proposed, decoder.speculator.accepted

    def _serve(self) -> None:
        while self._take_commands():
            self._admit()
            if self._schedule.prefilling:
                self._running.flush()
            self._prefiller.step()
            if self._prefiller.lets_decode():
                began = time.perf_counter()
                self._decoder.step()
                self._prefiller.decoded(time.perf_counter() - began)
            if not self._running.batches:
                self._running.flush()  # else the next step does, once it is under way
        for sequence in list(self._running.sequences.values()):
            self._running.forget(sequence)
            self._running.send(sequence.ident, Draining("the server is shutting down"))
        self._running.flush()
        mx.synchronize()

    def _take_commands(self) -> bool:
        idle = not self._running.sequences
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
                case Submit():
                    self._take(command)
                case Cancel(ident):
                    self._cancel(ident)
                case Stop():
                    return False

    def _take(self, submit: Submit) -> None:
        assert self.loaded is not None
        assert self.needs is not None
        try:
            need = self.needs.of_job(submit.job)
            sequence = Sequence(
                submit.ident, submit.job, self.loaded, need, submitted=submit.time, constraint=submit.constraint
            )
            self._running.add(sequence)
        except Exception:
            self._running.fail_new(submit.ident)

    def _admit(self) -> None:
        """Let in whom there is room for, or for whom others give way."""
        running_set, schedule = self._running, self._schedule
        now = time.perf_counter()
        shared = len(running_set.tenants) > 1
        if shared:
            schedule.shares.note(running_set.admitted(), running_set.asking(), now)
        while schedule.waiting:
            running = [sequence for sequence in running_set.admitted() if sequence not in schedule.giving_way]
            if not shared and len(running) >= schedule.max_running:
                break
            sequence = schedule.admit(running, now)
            if sequence is None:
                break
            if not sequence.begun:
                sequence.begun = True
                running_set.send(sequence.ident, Started(now - sequence.submitted))
            with running_set.containing(sequence):
                sequence.opening = sequence.open()
        if schedule.giving_way:
            self._park()

    def _park(self) -> None:
        """Have those that give way wait, with all that they have computed."""
        if any(sequence.sent for sequence in self._schedule.giving_way):
            self._decoder.step()  # so that every token that was sent has its KV computed, should it be cancelled there
        giving_way, self._schedule.giving_way = self._schedule.giving_way, []
        leaving = [sequence for sequence in giving_way if sequence.ident in self._running.sequences]
        self._decoder.release(*leaving)
        for sequence in leaving:
            if sequence.ident in self._running.sequences and sequence not in self._schedule.waiting:
                with self._running.containing(sequence):
                    self._running.park(sequence)
                    self._preempted += 1

    def _cancel(self, ident: int) -> None:
        """Between two steps, once every token that was sent has its KV computed or in flight."""
        sequence = self._running.sequences.get(ident)
        if sequence is not None and sequence.sent:
            self._decoder.step()  # its first token waits for others' prefill
        if sequence is None or ident not in self._running.sequences:
            return
        sequence.finish = Finish.CANCELLED
        self._decoder.release(sequence)
        if ident in self._running.sequences:
            with self._running.containing(sequence):
                self._running.finish(sequence)
