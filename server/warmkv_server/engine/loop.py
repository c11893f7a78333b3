"""The one thread that computes with MLX: it loads the model, prefills, decodes, and sends events back.

Elsewhere MLX is memory: the store's threads make arrays out of files, and look into them. Arrays that pass from one
thread to another are evaluated.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx

from warmkv_server.engine import prefill
from warmkv_server.engine.decode import Decoder
from warmkv_server.engine.group import Group
from warmkv_server.engine.memory import ran_out
from warmkv_server.engine.model import (
    LoadedModel,
    default_prefill_chunk,
    default_short_prompt,
    default_smallest_chunk,
    limited,
    prepare_device,
)
from warmkv_server.engine.need import Needs
from warmkv_server.engine.pace import Pace
from warmkv_server.engine.roster import Deliver, Roster
from warmkv_server.engine.schedule import Schedule, together
from warmkv_server.engine.sequence import Sequence
from warmkv_server.engine.speculate import Speculator
from warmkv_server.engine.types import EngineStats, Finish, Job, Progress, Started
from warmkv_server.errors import Draining
from warmkv_server.malloc import give_back

log = logging.getLogger(__name__)

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
        self._pace = Pace(prefill_chunk or default_prefill_chunk(), max_decode_gap, default_smallest_chunk())
        self._short_prompt = default_short_prompt() if short_prompt is None else short_prompt
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._schedule = Schedule(max_batch, inflight_bytes)
        self._roster = Roster(self._schedule, deliver, relieve)
        self._decoder = Decoder(self._roster, max_batch)
        self._speculate_tokens = speculate_tokens
        self._planned: set[tuple[int, int]] = set()
        self._prefilled = 0
        self._prefill_took = 0.0
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

    def stats(self) -> EngineStats:
        """From any thread."""
        speculator = self._decoder.speculator
        return EngineStats(
            queue_depth=len(self._schedule.waiting),
            prefilling=len(self._schedule.prefilling),
            decoding=sum(len(group.sequences) for group in list(self._roster.groups)),
            batch_size=self._decoder.rows,
            prefilled_tokens=self._prefilled,
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
            prepare_device()
            limits.enter_context(limited(self._schedule.budget // _FREED))
            self.loaded = self._load()
            self.needs = Needs.on(self.loaded, self._pace.chunk)
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
            self._prefill()
            if self._may_decode():
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

    def _may_decode(self) -> bool:
        """Whether a step of decoding comes before the next chunk.

        Not while somebody is one chunk away from a first token and those who decode can wait for it: short prefills
        run one after the other, and sequences of one length that came together decode together, without padding.
        """
        chunk = self._pace.chunk
        if not any(waiting.left <= chunk for waiting in self._schedule.prefilling):
            return True
        return time.perf_counter() - self._decoder.stepped + self._prefill_took > self._pace.gap

    def _prefill(self) -> None:
        sequence = self._schedule.pick()
        if sequence is None:
            return
        began = time.perf_counter()
        tokens = self._pace.tokens(sequence.prefill_end, decoding=bool(self._roster.groups))
        mates = self._schedule.mates(sequence, self._roster.running(), self._short_prompt, tokens)
        if len(mates) == 1:
            self._prefill_one(sequence)
        else:
            self._prefill_together(mates)
        self._prefill_took = time.perf_counter() - began

    def _prefill_one(self, sequence: Sequence) -> None:
        with self._roster.containing(sequence):
            if sequence.opening is not None and not self._open(sequence, sequence.opening):
                return
            before = sequence.done
            self._run_chunk(sequence)
            if sequence.done >= sequence.prefill_end:
                self._schedule.prefilling.remove(sequence)
                if not sequence.wants_token:
                    self._prefilled += sequence.done - before
                    self._roster.finish(sequence)
                    return
                prefill.choose_first(sequence)
            self._prefilled += sequence.done - before
            self._report(sequence)
            if sequence.pending is not None:
                self._decoder.begin(sequence)

    def _prefill_together(self, mates: list[Sequence]) -> None:
        """Run the only chunk of these. If it fails, whosever fault that is, each is prefilled alone."""
        for sequence in mates:
            if sequence.opening is not None:
                with self._roster.containing(sequence):
                    self._open(sequence, sequence.opening)
        if any(sequence.opening is not None for sequence in mates):
            return  # one that can't begin; the others wait
        with self._roster.containing(*mates):
            group = Group()
            for sequence in mates:
                group.join(sequence)
            try:
                choices = group.prefill(self._roster.flush_soon)
            except Exception as error:
                if ran_out(error):
                    raise
                log.warning("%d prompts can't be prefilled together (%s)", len(mates), type(error).__name__)
                for sequence in mates:
                    sequence.begin_apart()
                return
            for sequence in mates:
                self._prefilled += sequence.done
                self._schedule.prefilling.remove(sequence)
                self._report(sequence)
            self._decoder.begin_together(group, choices)

    def _open(self, sequence: Sequence, steps: Iterator[None]) -> bool:
        """Go on putting the reused prefix in place; at most for the gap while others decode. Whether it is done."""
        began = time.perf_counter()
        for _ in steps:
            if self._roster.groups and time.perf_counter() - began > self._pace.gap / 2:
                return False
        sequence.opening = None
        self._report(sequence)
        return True

    def _report(self, sequence: Sequence) -> None:
        """Tell how far the prompt is, where it is farther than before."""
        done = min(sequence.done, sequence.prompt_length)
        if done > sequence.reported:
            sequence.reported = done
            self._roster.send(sequence.ident, Progress(done, sequence.prompt_length))

    def _run_chunk(self, sequence: Sequence) -> None:
        prefix, began = sequence.done, time.perf_counter()
        prefill.run_chunk(sequence, self._pace.tokens(prefix, decoding=bool(self._roster.groups)))
        if sequence.done > prefix and not self._is_new_shape(sequence, prefix):
            self._pace.record(sequence.done - prefix, prefix, time.perf_counter() - began)

    def _is_new_shape(self, sequence: Sequence, prefix: int) -> bool:
        """Whether attention was planned for the chunk behind this prefix: what that took says nothing of the next."""
        shapes = sequence.loaded.cache_map.shapes
        if shapes is None or (shape := shapes.chunk(prefix, sequence.done)) in self._planned:
            return False
        self._planned.add(shape)
        return True

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
