"""The running set: every sequence in flight, what its client is told, and how far a failure reaches."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import mlx.core as mx

from warmkv_server.contract.generation import Event
from warmkv_server.engine.steps.batch import Batch
from warmkv_server.engine.steps.schedule import Schedule
from warmkv_server.engine.steps.sequence import Sequence
from warmkv_server.errors import EngineError, MemoryBudget, WarmKVError

log = logging.getLogger(__name__)

_RETRY_AFTER = 5.0
"""Seconds after which a request that memory ran out for may be sent again."""

_NO_MEMORY = (
    "unable to allocate",  # MLX's allocators
    "attempting to allocate",  # Metal, of one buffer that is too large
    "insufficient memory",  # Metal, of a command buffer that has failed
    "out of memory",  # CUDA
    "cudaerrormemoryallocation",
)
"""How MLX says that memory has run out, on each device."""

EventTo = tuple[int, Event | WarmKVError]


class Deliver(Protocol):
    def __call__(self, item: list[EventTo], *, at_once: bool) -> None:
        """Take events, on the MLX thread, in order; must not block. `at_once` lets the event loop run now."""


class RunningSet:
    """State of the MLX thread.

    Args:
        schedule: where sequences wait and are prefilled.
        deliver: takes the events.
        relieve: called when memory has run out; lets go, elsewhere, of what can be spared.

    Attributes:
        sequences: all that have not had their last event, by `ident`.
        batches: those that decode.
        tenants: how many of the sequences are each tenant's; 0 for one that had some.
    """

    def __init__(self, schedule: Schedule, deliver: Deliver, relieve: Callable[[], None]) -> None:
        self.schedule = schedule
        self.sequences: dict[int, Sequence] = {}
        self.batches: list[Batch] = []
        self.tenants: Counter[str] = Counter()
        self._deliver = deliver
        self._relieve = relieve
        self._outbox: list[EventTo] = []

    def add(self, sequence: Sequence) -> None:
        """Have it wait for its turn."""
        self.sequences[sequence.ident] = sequence
        self.tenants[sequence.tenant] += 1
        self.schedule.waiting.join(sequence.tenant, sequence)

    def asking(self) -> list[str]:
        """Tenants that have any sequence."""
        return [tenant for tenant, sequences in self.tenants.items() if sequences]

    def decodes_beside(self, tenant: str) -> bool:
        """Whether sequences of other tenants decode."""
        return any(row.tenant != tenant for batch in self.batches for row in batch.sequences)

    def park(self, sequence: Sequence) -> None:
        """Put one that is in no batch any more back into the line, before the others of its tenant."""
        sequence.park()
        if sequence in self.schedule.prefilling:
            self.schedule.prefilling.remove(sequence)
        self.schedule.waiting.come_back(sequence.tenant, sequence)

    def admitted(self) -> list[Sequence]:
        """Those that wait no longer. From any thread."""
        waiting = set(self.schedule.waiting)
        return [sequence for sequence in list(self.sequences.values()) if sequence not in waiting]

    def drop_empty_batches(self) -> None:
        self.batches = [batch for batch in self.batches if batch.sequences]

    def finish(self, sequence: Sequence) -> None:
        """Send its last event, with the KV that it has grown."""
        event = sequence.finished()
        self.forget(sequence)
        self.send(sequence.ident, event)

    @contextmanager
    def containing(self, *sequences: Sequence) -> Iterator[None]:
        """Let an exception end these sequences, and those that share a batch with them, and nothing else.

        Where memory ran out they begin again, once, after everybody has let go of what can be spared.
        """
        try:
            yield
        except Exception as error:
            shared = [batch for batch in self.batches if any(row in sequences for row in batch.sequences)]
            concerned = {*sequences, *(row for batch in shared for row in batch.sequences)}
            self.batches = [batch for batch in self.batches if batch not in shared]
            running = sorted((s for s in concerned if s.ident in self.sequences), key=lambda s: s.ident, reverse=True)
            if not ran_out(error):
                self.fail(running)
                return
            log.warning("memory ran out: %s", error)
            shared.clear()
            error.__traceback__ = None  # its frames hold arrays
            for sequence in running:
                self._rewind(sequence)
            mx.clear_cache()
            self._relieve()

    def _rewind(self, sequence: Sequence) -> None:
        """Put it back at the head of the queue; refuse it if it has been there before."""
        sequence.caches = []
        try:
            if sequence.rewound:
                raise MemoryBudget(
                    "memory ran out for the request, also alone; send less, or raise what the server may use",
                    retry_after=_RETRY_AFTER,
                )
            sequence.rewind()
        except MemoryBudget as refusal:
            self.forget(sequence)
            self.send(sequence.ident, refusal)
        except Exception:
            self.fail([sequence])
        else:
            if sequence in self.schedule.prefilling:
                self.schedule.prefilling.remove(sequence)
            self.schedule.waiting.go_ahead(sequence.tenant, sequence)

    def fail(self, sequences: Iterable[Sequence]) -> None:
        """End them, inside an exception's handler: the log has the exception, and the clients have its number there."""
        error = _logged()
        for sequence in sequences:
            if sequence.ident in self.sequences:
                self.forget(sequence)
                self.send(sequence.ident, error)

    def fail_new(self, ident: int) -> None:
        """End one that could not be made a sequence of, inside an exception's handler."""
        self.send(ident, _logged())

    def forget(self, sequence: Sequence) -> None:
        """Drop it wherever it waits or is prefilled; nothing more is sent."""
        if self.sequences.pop(sequence.ident, None) is not None:
            self.tenants[sequence.tenant] -= 1
        self.schedule.waiting.remove(sequence)
        if sequence in self.schedule.prefilling:
            self.schedule.prefilling.remove(sequence)
        sequence.caches = []

    def send(self, ident: int, event: Event | WarmKVError) -> None:
        self._outbox.append((ident, event))

    def flush(self, *, at_once: bool = True) -> None:
        """Deliver what was sent since the last time."""
        if self._outbox:
            self._deliver(self._outbox, at_once=at_once)
            self._outbox = []

    def flush_soon(self) -> None:
        """Deliver once this thread waits without Python's lock, instead of holding up what it is about to do."""
        self.flush(at_once=False)


def _logged() -> EngineError:
    """Log the exception that is handled, and make the error that has its number there."""
    error = EngineError(secrets.token_hex(6))
    log.error("engine error %s", error.error_id, exc_info=True)
    return error


def ran_out(error: BaseException) -> bool:
    """Whether it was for want of memory that a step has failed. (MLX raises RuntimeError for this as for all else.)"""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _NO_MEMORY)
