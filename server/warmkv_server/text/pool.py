"""Text work as the event loop sees it: content in, tokens out, at its tenant's turn and within bounds.

One process takes short content only, so that nobody's "hi" waits for the books of others. A process whose task is over
its time, or whose client has left, is killed, and a new one takes its place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from warmkv_server.contract.content import Chat, Encoded
from warmkv_server.contract.fairness import Bound, FairLine
from warmkv_server.contract.grammar import Grammar
from warmkv_server.errors import Draining, OperatorError, QueueFull
from warmkv_server.text.launch import Launcher, Process, StartedProcess
from warmkv_server.text.task import (
    ANSWER,
    BROKEN,
    FINDINGS,
    MEMORY_BYTES,
    NO_MEMORY,
    REFUSAL,
    Task,
    TokenizerSource,
    refusal_of,
)
from warmkv_server.text.traits import Traits
from warmkv_server.text.trial import SECONDS as TRIAL_SECONDS
from warmkv_server.text.trial import Trial

log = logging.getLogger(__name__)

SHORT_CHARACTERS = 32 << 10
"""Content up to this length is tokenised in some hundredths of a second."""
_SHORT_SECONDS, _LONG_SECONDS = 5.0, 10.0
"""For a task: what short content gets, and what long content gets besides the time for its length."""
_CHARACTERS_PER_SECOND = 256 << 10
"""A third of what one core tokenises, or less."""
_GRACE_SECONDS = 0.1
"""For a task whose client has left to end by itself, which costs less than a new process."""
_RETRY_SECONDS = 1.0
"""Before trying again, where no process can be started, or one ended before it was asked for anything."""
_MEMORY = f"took more than {MEMORY_BYTES >> 20} MiB of memory"


@dataclass(eq=False)
class _Job:
    task: Task | Trial
    tenant: str
    characters: int
    done: asyncio.Future[Any]
    ended_one: bool = False
    """Whether a process has ended over it."""

    @property
    def seconds(self) -> float:
        """The most that it may take."""
        if isinstance(self.task, Trial):
            return TRIAL_SECONDS
        if self.characters <= SHORT_CHARACTERS:
            return _SHORT_SECONDS
        return _LONG_SECONDS + self.characters / _CHARACTERS_PER_SECOND

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def refuse(self, why: str) -> None:
        """It was stopped: the client is told why."""
        log.warning("%s (%d characters) %s, and was stopped", self.task.work, self.characters, why)
        self.fail(self.task.refusal(why))


class TextPool:
    """Encodes content in processes of its own.

    Made on the event loop, where all of it is used but `found`.

    Args:
        bound: on the tasks that wait, short and long apart.
        first: the process that others begin from; None to start one with the first task.

    Attributes:
        bytes_per_token: of UTF-8 that one token stands for at most; 0 where that can't be told, or not yet.
        traits: of the chat template, as far as it was probed.
        source: what the tokenizer is made of, once it is found.
    """

    def __init__(self, bound: Bound, first: StartedProcess | None = None) -> None:
        self._bound = bound
        self._launcher = Launcher(first)
        self._short: FairLine[_Job] = FairLine()
        self._long: FairLine[_Job] = FairLine()
        long_ones = max(1, min(4, (os.cpu_count() or 1) // 4))
        self._workers = [
            _Worker(self._launcher, self._dispatch, self._again, takes_long=number > 0)
            for number in range(1 + long_ones)
        ]
        self._beginning: asyncio.Task[None] | None = None
        self._stopping = False
        self._traits: Mapping[str, Any] | None = None
        self.bytes_per_token = 0
        self.traits = Traits()
        self.source: TokenizerSource | None = None

    def found(self, source: TokenizerSource) -> None:
        """Say what the tokenizer is made of. From any thread, once."""
        self.source = source
        self._launcher.tell(source)

    async def ready(self) -> None:
        """Start the processes, unless they are, and wait until they have the tokenizer. What comes before waits.

        Raises:
            OperatorError: if the tokenizer can't be loaded.
        """
        if self._beginning is None:
            self._beginning = asyncio.create_task(self._begin())
        await asyncio.shield(self._beginning)

    async def encode(self, task: Task, tenant: str) -> Encoded:
        """The tokens of content: what `Text.encode` returns, or raises.

        Raises:
            InvalidField: if it took too much time or memory, besides what `Text.encode` raises.
            QueueFull: if too many wait.
            Draining: once `stop` was called.
        """
        if isinstance(task.content, Chat):
            task = replace(task, traits=self._traits)
        encoded: Encoded = await self._do(task, tenant)
        return encoded

    async def satisfy(self, arguments: Sequence[tuple[str, str]], tenant: str) -> list[bool]:
        """Whether the arguments of calls satisfy the schemas of their tools; each behind its schema, both JSON.

        Raises:
            InvalidField: if that took too much time or memory.
        """
        found: list[bool] = await self._do(Task(None, arguments=tuple(arguments)), tenant)
        return found

    async def probe(self) -> dict[str, Any]:
        """What the server makes of the tokenizer and the chat template: what `Text.probe` returns.

        Raises:
            InvalidField: if the chat template took too much time or memory.
        """
        findings: dict[str, Any] = await self._do(Task(None), "")
        if findings["template"] is not None:
            self._traits = findings["template"]["traits"]
            self.traits = Traits.of(self._traits)
        return findings

    async def try_grammar(self, grammar: Grammar, tenant: str) -> None:
        """Try a grammar, where it does no harm.

        Raises:
            InvalidField, Unsupported, ConstraintTooComplex: if it can't be followed.
            QueueFull: if too many wait.
            Draining: once `stop` was called.
        """
        await self._do(Trial(grammar), tenant)

    async def _do(self, task: Task | Trial, tenant: str) -> Any:
        if self._stopping:
            raise Draining("the server is shutting down")
        await self.ready()
        job = _Job(task, tenant, task.characters, asyncio.get_running_loop().create_future())
        line = self._line(job)
        if self._bound.refuses(len(line), line.held_by(tenant)):
            raise QueueFull(
                f"{len(line)} texts wait to be tokenised, the most this server allows; try again",
                retry_after=1.0,
                limit=self._bound.most,
                actual=len(line),
                unit="requests",
            )
        line.join(tenant, job)
        self._dispatch()
        try:
            return await job.done
        finally:
            line.remove(job)
            for worker in self._workers:
                worker.leave(job)

    def stop(self) -> None:
        """Kill the processes; what they were doing fails as draining."""
        self._stopping = True
        if self._beginning is not None:
            self._beginning.cancel()
        for worker in self._workers:
            worker.end()
        for job in (*self._short, *self._long):
            job.fail(Draining("the server is shutting down"))
        self._launcher.close()

    async def _begin(self) -> None:
        self.bytes_per_token = await self._launcher.loaded()
        await asyncio.gather(*(worker.start() for worker in self._workers))

    def _line(self, job: _Job) -> FairLine[_Job]:
        short = job.characters <= SHORT_CHARACTERS and not isinstance(job.task, Trial)
        return self._short if short else self._long

    def _again(self, job: _Job) -> None:
        self._line(job).go_ahead(job.tenant, job)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give those that wait to processes that have nothing to do."""
        for worker in self._workers:
            while worker.idle and ((worker.takes_long and self._long) or self._short):
                job = (self._long if worker.takes_long and self._long else self._short).take()
                if not job.done.done():
                    worker.take(job)


class _Worker:
    """One process after another, and the task of the present one.

    Args:
        dispatch: called when there is nothing to do.
        again: called with a job that another process is to try.
    """

    def __init__(
        self, launcher: Launcher, dispatch: Callable[[], None], again: Callable[[_Job], None], *, takes_long: bool
    ) -> None:
        self.takes_long = takes_long
        self._launcher = launcher
        self._dispatch = dispatch
        self._again = again
        self._process: Process | None = None
        self._job: _Job | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        return self._process is not None and self._job is None

    def start(self, after: float = 0.0) -> asyncio.Task[None]:
        """Start a process, the first or a new one."""
        self._process = None
        self._starting = asyncio.create_task(self._start(after))
        return self._starting

    def take(self, job: _Job) -> None:
        assert self._process is not None
        self._job = job
        self._within(job.seconds, f"took longer than {job.seconds:.0f} seconds")
        self._process.send(job.task)

    def leave(self, job: _Job) -> None:
        """Nobody waits for the job any more."""
        if self._job is job:
            self._within(_GRACE_SECONDS, "took longer than its client waited")

    def end(self) -> None:
        """Kill the process, for good."""
        if self._starting is not None:
            self._starting.cancel()
        job = self._let_go()
        if job is not None:
            job.fail(Draining("the server is shutting down"))
        if self._process is not None:
            self._process.kill()
            self._process = None

    async def _start(self, after: float) -> None:
        await asyncio.sleep(after)
        while True:
            try:
                self._process = await self._launcher.launch(self._replied, self._ended)
                break
            except (OSError, OperatorError) as error:
                log.warning("no process could be started to tokenise with: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
        self._dispatch()

    def _within(self, seconds: float, why: str) -> None:
        """Stop the task after so many seconds, unless it ends before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._stop, why)

    def _stop(self, why: str) -> None:
        job = self._let_go()
        assert job is not None
        if not job.done.done():
            job.refuse(why)
        assert self._process is not None
        self._process.kill()
        self.start()

    def _replied(self, kind: bytes, leaving: bool, body: bytes) -> None:
        job = self._let_go()
        assert job is not None
        if kind == NO_MEMORY:
            job.refuse(_MEMORY)
        elif kind == REFUSAL:
            job.fail(refusal_of(body))
        elif kind == BROKEN:
            job.fail(RuntimeError(f"text work failed: {body.decode(errors='replace')}"))
        elif kind == FINDINGS and not job.done.done():
            job.done.set_result(json.loads(body))
        elif not job.done.done():
            replaced, holds_back, dated, thinks = ANSWER.unpack_from(body)
            tokens = np.frombuffer(body[ANSWER.size :], np.int32)
            job.done.set_result(Encoded(tokens, replaced, holds_back, dated, thinks))
        if leaving:
            assert self._process is not None
            self._process.kill()
            self.start()
        else:
            self._dispatch()

    def _ended(self) -> None:
        """It ended by itself: a library got no memory and aborted it, or somebody killed it."""
        job = self._let_go()
        self.start(0.0 if job is not None else _RETRY_SECONDS)
        if job is None or job.done.done():
            return
        if job.ended_one:
            job.refuse(_MEMORY)
        else:
            job.ended_one = True
            # By then it is known which others have ended too.
            asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._again, job)

    def _let_go(self) -> _Job | None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        job, self._job = self._job, None
        return job
