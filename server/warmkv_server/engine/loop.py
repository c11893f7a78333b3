"""The one thread that owns MLX: it loads the model, prefills, decodes, and sends events back.

Nothing else in the process calls MLX operations. Arrays that leave this thread are evaluated.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from warmkv_server.engine import prefill
from warmkv_server.engine.group import Group
from warmkv_server.engine.model import LoadedModel, default_prefill_chunk, prepare_device
from warmkv_server.engine.pace import Pace
from warmkv_server.engine.sampling import Choice
from warmkv_server.engine.schedule import Schedule, cost
from warmkv_server.engine.sequence import Sequence
from warmkv_server.engine.speculate import Speculator
from warmkv_server.engine.types import EngineStats, Event, Finish, Job, Logprobs, Progress, Started
from warmkv_server.errors import Draining, EngineError, WarmKVError

log = logging.getLogger(__name__)

RELEASE_AFTER = 2.0
"""Seconds without work after which cached memory goes back to the system; sooner, the next request would only have to
get it again."""

Message = tuple[int, Event | WarmKVError]
Deliver = Callable[[list[Message]], None]


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
        deliver: called on this thread with events in order; must not block.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        deliver: Deliver,
        *,
        max_batch: int,
        prefill_chunk: int,
        max_decode_gap: float,
        inflight_bytes: int,
        speculate_tokens: int,
    ) -> None:
        self._load = load
        self._deliver = deliver
        self._max_batch = max_batch
        self._pace = Pace(prefill_chunk or default_prefill_chunk(), max_decode_gap)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._schedule = Schedule(max_batch, inflight_bytes)
        self._groups: list[Group] = []
        self._speculate_tokens = speculate_tokens
        self._speculator: Speculator | None = None
        self._sequences: dict[int, Sequence] = {}
        self._submitted: dict[int, float] = {}
        self._outbox: list[Message] = []
        self._prefilled = self._decoded = self._batch_size = 0
        self._cached = True
        self._stepped = self._prefill_took = 0.0
        self._thread = threading.Thread(target=self._main, name="mlx", daemon=True)
        self.loaded: LoadedModel | None = None
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
        """From any thread; each figure is whole, together they may be a step apart."""
        decoding = sum(len(group.sequences) for group in list(self._groups))
        return EngineStats(
            queue_depth=len(self._schedule.waiting),
            prefilling=len(self._schedule.prefilling),
            decoding=decoding,
            batch_size=self._batch_size,
            prefilled_tokens=self._prefilled,
            decoded_tokens=self._decoded,
            proposed_tokens=self._speculator.proposed if self._speculator else 0,
            accepted_tokens=self._speculator.accepted if self._speculator else 0,
            in_flight_bytes=self._bytes_in_flight(),
        )

    def _main(self) -> None:
        try:
            prepare_device()
            self.loaded = self._load()
            if self._speculate_tokens:
                self._speculator = Speculator(self._speculate_tokens, self.loaded)
        except BaseException as error:
            self.failure = error
            return
        finally:
            self.ready.set()
        while self._take_commands():
            self._admit()
            if self._schedule.prefilling:
                self._flush()
            self._prefill()
            if self._may_decode():
                self._decode()
            if not self._groups:
                self._flush()  # else the next step does, once it is under way
        for sequence in list(self._sequences.values()):
            self._forget(sequence)
            self._send(sequence.ident, Draining("the server is shutting down"))
        self._flush()
        mx.synchronize()
        # Streams left to the interpreter's end abort the process now and then.
        mx.clear_streams()

    def _take_commands(self) -> bool:
        idle = not self._sequences
        while True:
            try:
                command = self._commands.get(block=idle, timeout=RELEASE_AFTER if self._cached else None)
            except queue.Empty:
                if not idle:
                    return True
                mx.clear_cache()
                self._cached = False
                continue
            self._cached = True
            idle = False
            match command:
                case Submit(ident, job, submitted):
                    assert self.loaded is not None
                    sequence = Sequence(ident, job, self.loaded, cost(job, self.loaded.cache_map))
                    self._sequences[ident] = sequence
                    self._submitted[ident] = submitted
                    self._schedule.waiting.append(sequence)
                case Cancel(ident):
                    self._cancel(ident)
                case Stop():
                    return False

    def _admit(self) -> None:
        while True:
            running = len(self._sequences) - len(self._schedule.waiting)
            sequence = self._schedule.admit(running, self._bytes_in_flight())
            if sequence is None:
                return
            self._send(sequence.ident, Started(time.perf_counter() - self._submitted[sequence.ident]))
            with self._containing(sequence):
                sequence.opening = sequence.open()

    def _may_decode(self) -> bool:
        """Whether a step of decoding comes before the next chunk.

        Not while somebody is one chunk away from a first token and those who decode can wait for it: short prefills
        run one after the other, and sequences of one length that came together decode together, without padding.
        """
        chunk = self._pace.chunk
        if not any(waiting.prefill_end - waiting.done <= chunk for waiting in self._schedule.prefilling):
            return True
        return time.perf_counter() - self._stepped + self._prefill_took > self._pace.gap

    def _prefill(self) -> None:
        sequence = self._schedule.pick()
        if sequence is None:
            return
        began = time.perf_counter()
        self._prefill_one(sequence)
        self._prefill_took = time.perf_counter() - began

    def _prefill_one(self, sequence: Sequence) -> None:
        with self._containing(sequence):
            if sequence.opening is not None and not self._open(sequence, sequence.opening):
                return
            before = sequence.done
            self._run_chunk(sequence)
            if sequence.done >= sequence.prefill_end:
                self._schedule.prefilling.remove(sequence)
                if sequence.job.answer is None:
                    self._prefilled += sequence.done - before
                    self._finish(sequence, Finish.PREFILLED)
                    return
                prefill.choose_first(sequence)
            self._prefilled += sequence.done - before
            self._send(sequence.ident, Progress(sequence.done, sequence.prompt_length))
            if sequence.pending is not None:
                self._start_decoding(sequence)

    def _open(self, sequence: Sequence, steps: Iterator[None]) -> bool:
        """Go on putting the reused prefix in place; at most for the gap while others decode. Whether it is done."""
        began = time.perf_counter()
        for _ in steps:
            if self._groups and time.perf_counter() - began > self._pace.gap / 2:
                return False
        sequence.opening = None
        self._send(sequence.ident, Progress(sequence.done, sequence.prompt_length))
        return True

    def _run_chunk(self, sequence: Sequence) -> None:
        prefix, began = sequence.done, time.perf_counter()
        prefill.run_chunk(sequence, self._pace.tokens(prefix, decoding=bool(self._groups)))
        if sequence.done > prefix:
            self._pace.record(sequence.done - prefix, prefix, time.perf_counter() - began)

    def _start_decoding(self, sequence: Sequence) -> None:
        finish = self._emit(sequence, *sequence.sampled())
        sequence.sent = True
        self._flush()
        if finish is not None:
            prefill.feed(sequence, sequence.completion[-1], choose=False)
            sequence.keep_snapshot(sequence.loaded.cache_map.snapshot(sequence.caches))
            self._finish(sequence, finish)
            return
        group = next((g for g in self._groups if g.fits(sequence, self._max_batch)), None)
        if group is None:
            group = Group()
        with self._containing(sequence, *group.sequences):
            group.join(sequence)
            if group not in self._groups:
                self._groups.append(group)

    def _decode(self) -> None:
        self._stepped = time.perf_counter()
        if self._speculator is not None and self._speculate(self._speculator):
            return
        launched = []
        self._batch_size = sum(len(group.sequences) for group in self._groups)
        for group in list(self._groups):
            with self._containing(*group.sequences):
                launched.append((group, group.launch(self._flush)))
        for group, choices in launched:
            with self._containing(*group.sequences):
                leaving: list[tuple[Sequence, Finish]] = []
                failed: list[Sequence] = []
                for sequence, choice in zip(group.sequences, choices, strict=True):
                    sampled = None if sequence.sent else sequence.sampled()
                    try:
                        finish = None if sampled is None else self._emit(sequence, *sampled)
                        if finish is None and isinstance(choice, Exception):
                            raise choice
                    except Exception:  # of its own text or sampling: the others' step went well
                        self._fail([sequence])
                        failed.append(sequence)
                        continue
                    sequence.pending, sequence.sent = choice if isinstance(choice, Choice) else None, False
                    if finish is not None:
                        group.snapshot(sequence)
                        leaving.append((sequence, finish))
                if leaving or failed:
                    self._flush()
                    group.leave([*(sequence for sequence, _ in leaving), *failed])
                for sequence, finish in leaving:
                    with self._containing(sequence):
                        self._finish(sequence, finish)
        self._groups = [group for group in self._groups if group.sequences]

    def _speculate(self, speculator: Speculator) -> bool:
        """Let a sequence that decodes alone take a guess in one step. False if there was none, and no step."""
        if len(self._groups) != 1 or len(self._groups[0].sequences) != 1:
            return False
        group, sequence = self._groups[0], self._groups[0].sequences[0]
        with self._containing(sequence):
            guess = speculator.propose(sequence)
            if not guess:
                return False
            self._batch_size = 1
            choices = group.verify(guess)
            finish = None if sequence.sent else self._emit(sequence, *sequence.sampled())
            self._flush()
            right = 0
            while finish is None and right < len(guess) and choices[right].read() == guess[right]:
                finish = self._emit(sequence, guess[right], choices[right].logprobs())
                right += 1
            group.cut(len(guess) - right)
            speculator.learn(sequence, len(guess), right)
            choices[right].read()
            sequence.pending, sequence.sent = choices[right], False
            if finish is not None:
                self._flush()
                group.leave([sequence])
                self._finish(sequence, finish)
        self._groups = [group for group in self._groups if group.sequences]
        return True

    def _emit(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> Finish | None:
        delta, finish = sequence.emit(token, logprobs)
        self._decoded += 1
        self._send(sequence.ident, delta)
        return finish

    def _cancel(self, ident: int) -> None:
        """Between two steps, once every token that was sent has its KV computed or in flight."""
        sequence = self._sequences.get(ident)
        if sequence is not None and sequence.sent:
            self._decode()  # its first token waits for others' prefill
        if sequence is None or ident not in self._sequences:
            return
        group = self._group_of(sequence)
        if group is not None:
            with self._containing(*group.sequences):
                group.snapshot(sequence)
                group.leave([sequence])
            self._groups = [g for g in self._groups if g.sequences]
        if ident in self._sequences:
            with self._containing(sequence):
                self._finish(sequence, Finish.CANCELLED)

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        event = sequence.finished(finish)
        self._forget(sequence)
        self._send(sequence.ident, event)

    @contextmanager
    def _containing(self, *sequences: Sequence) -> Iterator[None]:
        """Let an exception end these sequences, and those that share a batch with them, and nothing else."""
        try:
            yield
        except Exception:
            shared = [group for group in self._groups if any(row in sequences for row in group.sequences)]
            concerned = {*sequences, *(row for group in shared for row in group.sequences)}
            self._groups = [group for group in self._groups if group not in shared]
            self._fail(concerned)

    def _fail(self, sequences: Iterable[Sequence]) -> None:
        error_id = secrets.token_hex(6)
        log.error("engine error %s", error_id, exc_info=True)
        for sequence in sequences:
            if sequence.ident in self._sequences:
                self._forget(sequence)
                self._send(sequence.ident, EngineError(error_id))

    def _forget(self, sequence: Sequence) -> None:
        self._sequences.pop(sequence.ident, None)
        self._submitted.pop(sequence.ident, None)
        if sequence in self._schedule.waiting:
            self._schedule.waiting.remove(sequence)
        if sequence in self._schedule.prefilling:
            self._schedule.prefilling.remove(sequence)
        sequence.caches = []

    def _group_of(self, sequence: Sequence) -> Group | None:
        return next((group for group in self._groups if sequence in group.sequences), None)

    def _bytes_in_flight(self) -> int:
        waiting = list(self._schedule.waiting)
        return sum(sequence.cost for sequence in list(self._sequences.values()) if sequence not in waiting)

    def _send(self, ident: int, event: Event | WarmKVError) -> None:
        self._outbox.append((ident, event))

    def _flush(self) -> None:
        if self._outbox:
            self._deliver(self._outbox)
            self._outbox = []
