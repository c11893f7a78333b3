"""A request at work, on a task of its own, watched by whoever waits for its events.

The task outlives the call that began it. When the last watcher goes away the run is told to stop, and it still
finishes what the API promises, such as committing the tokens sampled so far, before it lets go of its agent.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from warmkv_server.agents.types import Activity, Doing
from warmkv_server.errors import Draining, EngineError, RequestCancelled, WarmKVError

log = logging.getLogger(__name__)
EventT = TypeVar("EventT")
Seen = TypeVar("Seen", covariant=True)


def internal_error(where: str) -> EngineError:
    """Log the exception being handled under a new id, and make the error that tells a client this id and no more."""
    error_id = secrets.token_hex(6)
    log.error("internal error %s in %s", error_id, where, exc_info=True)
    return EngineError(error_id)


class Reader(Protocol[Seen]):
    def next(self) -> Sequence[Seen]:
        """The next event that it hasn't had; empty if there is none yet."""


class Events(Protocol[EventT]):
    """What was published, for whoever reads it from the start."""

    def add(self, event: EventT) -> None: ...

    def reader(self) -> Reader[EventT]: ...

    def leave(self, reader: Any) -> None:
        """This one reads no more."""


class AllEvents(list[EventT]):
    """Every event as it is: for runs that have few."""

    def add(self, event: EventT) -> None:
        self.append(event)

    def reader(self) -> _InOrder[EventT]:
        return _InOrder(self)

    def leave(self, reader: Any) -> None:
        """All is kept."""


class _InOrder(Generic[EventT]):
    def __init__(self, events: AllEvents[EventT]) -> None:
        self._events = events
        self._seen = 0

    def next(self) -> list[EventT]:
        events = self._events[self._seen : self._seen + 1]
        self._seen += len(events)
        return events


class Run(Generic[EventT]):
    """One request at work.

    Args:
        events: where what it publishes is kept; by default, all as it is.

    Attributes:
        name: for the log.
        events: what was published, such that a watcher that joins late sees all of it.
        error: why it failed, once it is over.
        stopped: why it was told to stop, if it was.
    """

    def __init__(self, name: str, events: Events[EventT] | None = None) -> None:
        self.name = name
        self.events: Events[EventT] = events if events is not None else AllEvents()
        self.error: WarmKVError | None = None
        self.stopped: WarmKVError | None = None
        self.over = asyncio.Event()
        self._doing = Doing(Activity.QUEUED)
        self._watches: list[Watch[EventT]] = []
        self._endings: list[Callable[[], object]] = []
        self._interrupt: Callable[[], object] = _nothing
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def replay(cls, name: str, events: Sequence[EventT], error: WarmKVError | None = None) -> Run[EventT]:
        """A run that is over: its watchers see these events, then the error if there is one."""
        run = cls(name)
        run.events, run.error = AllEvents(events), error
        run.over.set()
        return run

    def start(self, work: Callable[[Run[EventT]], Awaitable[None]]) -> None:
        """Begin. Runs that are started one after another get to their first `await` in the same order."""
        self._task = asyncio.create_task(self._contain(work), name=self.name)
        self._task.add_done_callback(self._end)
        self._interrupt = self._task.cancel

    @property
    def doing(self) -> Doing:
        """What it does now, for whoever asks."""
        return self._doing

    @doing.setter
    def doing(self, doing: Doing) -> None:
        self._doing = doing
        self._wake()

    def publish(self, event: EventT) -> None:
        self.events.add(event)
        self._wake()

    def stop(self, reason: WarmKVError) -> None:
        """Tell it to stop, and why. The first reason counts. Returns at once; await `over` for the end."""
        if self.stopped is None and not self.over.is_set():
            self.stopped = reason
            self._interrupt()

    def check(self) -> None:
        """Raise the reason, if it was told to stop."""
        if self.stopped is not None:
            raise self.stopped

    @contextmanager
    def interrupted_by(self, interrupt: Callable[[], object]) -> Iterator[None]:
        """Have `stop` call this inside the block, instead of cancelling whatever is awaited."""
        previous, self._interrupt = self._interrupt, interrupt
        try:
            yield
        finally:
            self._interrupt = previous

    def uninterrupted(self) -> AbstractContextManager[None]:
        """A block that `stop` doesn't touch: a commit."""
        return self.interrupted_by(_nothing)

    def when_over(self, call: Callable[[], object]) -> None:
        """Have this called when it is over, before `over` is set."""
        self._endings.append(call)

    def watch(self) -> Watch[EventT]:
        return Watch(self)

    async def result(self) -> EventT:
        """Wait for the only, or the last, event.

        Raises:
            WarmKVError: as the run failed.
        """
        with self.watch() as watch:
            return await watch.last()

    def attach(self, watch: Watch[EventT]) -> None:
        self._watches.append(watch)

    def detach(self, watch: Watch[EventT]) -> None:
        self._watches.remove(watch)
        if not self._watches:
            self.stop(RequestCancelled("the request was cancelled, or its client went away"))

    async def _contain(self, work: Callable[[Run[EventT]], Awaitable[None]]) -> None:
        try:
            await work(self)
        except WarmKVError as error:
            self.error = error
        except Exception:
            self.error = internal_error(self.name)

    def _end(self, task: asyncio.Task[None]) -> None:
        # A task that is cancelled before its first step runs none of its code, so this can't be in a `finally`.
        if task.cancelled():
            self.error = self.stopped or Draining("the server is shutting down")
        for call in self._endings:
            try:
                call()
            except Exception:  # whoever waits for the end must see it
                internal_error(self.name)
        self.over.set()
        self._wake()

    def _wake(self) -> None:
        for watch in self._watches:
            watch.news.set()


class Watch(Generic[EventT]):
    """One reader of a run, from its first event: `with run.watch() as watch: async for event in watch`.

    Leaving the block is synchronous, so that it works wherever a cancelled call ends.
    """

    def __init__(self, run: Run[EventT]) -> None:
        self._run = run
        self._reader = run.events.reader()
        self.news = asyncio.Event()

    def __enter__(self) -> Self:
        self._run.attach(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.events.leave(self._reader)
        self._run.detach(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventT:
        while not (events := self._reader.next()):
            if self._run.over.is_set():
                if self._run.error is not None:
                    raise self._run.error
                raise StopAsyncIteration
            self.news.clear()
            await self.news.wait()
        return events[0]

    async def last(self) -> EventT:
        """Wait for the only, or the last, event.

        Raises:
            WarmKVError: as the run failed.
        """
        last: list[EventT] = []
        async for event in self:
            last = [event]
        return last[0]

    async def progress(self, seconds: float) -> AsyncIterator[Doing]:
        """What the run does until it is over: now, when it changes, and where it doesn't change, every so many seconds.

        Who reads slowly gets what is so then, and not all that was in between.
        """
        told: Doing | None = None
        while not self._run.over.is_set():
            if told != self._run.doing:
                told = self._run.doing
                yield told
                continue
            self.news.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self.news.wait()
            except TimeoutError:
                told = None


def _nothing() -> None:
    """Interrupts nothing."""
