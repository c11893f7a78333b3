"""The engine as the rest of the server sees it: asynchronous, on the event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from warmkv_server.contract.fairness import Bound, Tenants
from warmkv_server.contract.generation import Delta, EngineStats, Event, Finished, Job, Started
from warmkv_server.contract.grammar import Grammar
from warmkv_server.contract.pressure import MemoryPressure
from warmkv_server.contract.settings import Settings
from warmkv_server.engine.cache.codecs.choose import codecs_of
from warmkv_server.engine.cache.codecs.codec import CodecPlan
from warmkv_server.engine.model import load as model
from warmkv_server.engine.model.load import ModelInfo
from warmkv_server.engine.model.load_progress import LoadProgress, untold
from warmkv_server.engine.model.memory_need import MemoryNeeds
from warmkv_server.engine.output.compiler import Compiler
from warmkv_server.engine.output.constraint import Constraint, Vocabulary
from warmkv_server.engine.output.same_text import SameText, Tokens, may_say_the_same
from warmkv_server.engine.steps.delivery import Delivery
from warmkv_server.engine.steps.loop import Cancel, Failed, News, StepLoop, Stop, Submit
from warmkv_server.engine.steps.running_set import EventTo
from warmkv_server.engine.steps.schedule import together
from warmkv_server.errors import Draining, EngineError, MemoryBudget, QueueFull, Unsupported, WarmKVError
from warmkv_server.text.launch import StartedProcess
from warmkv_server.text.pool import TextPool

log = logging.getLogger(__name__)

_RELIEF_SECONDS = 1.0
"""Longest wait for others to let go of memory, before trying again without."""


class Handle:
    """One running job: an asynchronous iterator over its events, for one reader.

    Attributes:
        phase: queued, prefilling, decoding or done.
    """

    def __init__(self, engine: Engine, ident: int, job: Job) -> None:
        self._engine = engine
        self._ident = ident
        self._job = job
        self._events: deque[Event] = deque()
        self._error: WarmKVError | None = None
        self._arrived = asyncio.Event()
        self.phase = "queued"

    @property
    def tenant(self) -> str:
        return self._job.tenant

    def cancel(self) -> None:
        """End it within a step. The iterator goes on to `Finished`, unless the job fails or has ended."""
        if self.phase != "done":
            self._engine.cancel(self._ident)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events up to `Finished`.

        Raises:
            WarmKVError: if the sequence failed, or the engine was stopped under it.
        """
        while True:
            while self._events:
                event = self._events.popleft()
                yield event
                if isinstance(event, Finished):
                    return
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()

    def push(self, event: Event | WarmKVError) -> None:
        """Take the next event, on the event loop."""
        match event:
            case WarmKVError():
                self.fail(event)
            case Started():
                self.phase = "prefilling"
            case Delta():
                self.phase = "decoding"
            case Finished():
                self.phase = "done"
        if not isinstance(event, WarmKVError):
            self._events.append(event)
        self._arrived.set()

    def fail(self, error: WarmKVError) -> None:
        """End with this error, behind the events that are there."""
        self._error, self.phase = error, "done"
        self._arrived.set()


class Engine:
    """Owns the MLX thread. Made by `start`; used from one event loop."""

    def __init__(
        self,
        settings: Settings,
        text: StartedProcess | None,
        tenants: Tenants,
        codecs: CodecPlan,
        constants: Path | None,
        pressure: MemoryPressure,
        tell: Callable[[bool], object],
        progress: LoadProgress,
    ) -> None:
        self._settings = settings
        self._asyncio = asyncio.get_running_loop()
        self._handles: dict[int, Handle] = {}
        self._idents = itertools.count()
        self._bound = Bound(settings.max_batch + settings.max_queue, tenants)
        self._pressure = pressure
        self._tell = tell
        self._stopping = False
        self._delivery = Delivery(self._asyncio, self._deliver)
        self.text = TextPool(Bound(settings.max_queue, tenants), text)
        self._loop = StepLoop(
            lambda: model.load(
                settings.model,
                adapter=settings.adapter,
                codecs=codecs,
                constants=constants,
                context_limit=settings.context_limit,
                chat_template=settings.chat_template,
                tokenizer_found=self.text.found,
                progress=progress,
            ),
            self._delivery.send,
            self._relieve_from_thread,
            self._tell_from_thread,
            settings,
        )
        self._compiler = Compiler(self._vocabulary, self.text.try_grammar)
        self._same_text: SameText | None = None
        self._bytes_known = True
        self.lost: asyncio.Future[str] = self._asyncio.create_future()
        """Has the id of the log's entry, once the engine has failed for good."""
        self.info: ModelInfo
        self.needs: MemoryNeeds

    @classmethod
    async def start(
        cls,
        settings: Settings,
        text: StartedProcess | None = None,
        *,
        tenants: Tenants | None = None,
        codecs: CodecPlan | None = None,
        constants: Path | None = None,
        pressure: MemoryPressure | None = None,
        tell: Callable[[bool], object] = lambda _: None,
        progress: LoadProgress = untold,
    ) -> Engine:
        """Start the MLX thread and load the model on it. `text.ready` says when content can be tokenised.

        Args:
            text: the first process for text work; None to start one when it is needed.
            tenants: that share the engine. Where it is full, one that holds less than its equal share isn't refused.
            codecs: how the KV is stored, if not as the settings say.
            constants: folder that keeps what codecs need to know of models; None to find it out at every start.
            pressure: relieved when memory has run out.
            tell: called on the event loop with False when the engine has failed, and with True when it runs again.
            progress: called on the MLX thread with how far the weights are loaded.

        Raises:
            OperatorError: if the model can't be served.
        """
        codecs = codecs or codecs_of(settings)
        pressure = pressure or MemoryPressure()
        engine = cls(settings, text, tenants or Tenants(), codecs, constants, pressure, tell, progress)
        engine._loop.start()
        await asyncio.to_thread(engine._loop.ready.wait)
        if engine._loop.failure is not None:
            engine.text.stop()
            await asyncio.to_thread(engine._loop.join)
            engine._delivery.close()
            raise engine._loop.failure
        assert engine._loop.loaded is not None
        assert engine._loop.needs is not None
        engine.info, engine.needs = engine._loop.loaded.info, engine._loop.needs
        return engine

    @property
    def text_bytes(self) -> int | None:
        """Of text that a context can hold at most; None if the tokenizer doesn't tell."""
        return self.text.bytes_per_token * self.info.context_limit or None

    def may_say_the_same(self, held: Tokens, wanted: Tokens, common: int) -> bool:
        """Whether more than the first `common` tokens may say the same; `same_text` knows. At once."""
        assert self._loop.loaded is not None
        return may_say_the_same(self._loop.loaded.spelling, held, wanted, common)

    async def same_text(self) -> SameText | None:
        """What tells which tokens say the same; None for a model whose tokens' bytes aren't known."""
        if self._same_text is None and self._bytes_known:
            assert self._loop.loaded is not None
            try:
                self._same_text = SameText(await self._compiler.vocabulary(), self._loop.loaded.spelling)
            except Unsupported:
                self._bytes_known = False
        return self._same_text

    async def constrain(self, grammar: Grammar, tenant: str) -> Constraint:
        """What holds one answer to a grammar, for `submit`.

        Raises:
            InvalidField, Unsupported, ConstraintTooComplex: if it can't be followed.
            QueueFull, Draining: as all text work.
        """
        return await self._compiler.compile(grammar, tenant)

    async def can_constrain(self) -> bool:
        """Whether this model's answers can be held to a grammar. Takes a second or so, the first time."""
        try:
            await self._compiler.vocabulary()
        except Unsupported:
            return False
        return True

    def submit(self, job: Job, constraint: Constraint | None = None) -> Handle:
        """Queue a job.

        Args:
            constraint: on the answer, of its own.

        Raises:
            Draining: once `stop` was called.
            EngineError: once it is lost.
            MemoryBudget: if it could never run within `inflight_bytes`.
            QueueFull: if too many are waiting.
        """
        if self._stopping:
            raise Draining("the server is shutting down")
        if self.lost.done():
            raise EngineError(self.lost.result())
        self.check_fits(len(job.tokens), job.reuse.length, job.answer.max_tokens if job.answer is not None else 0)
        own = sum(handle.tenant == job.tenant for handle in self._handles.values())
        if self._bound.refuses(len(self._handles), own):
            raise QueueFull(
                f"{len(self._handles)} requests are running or waiting; try again",
                retry_after=1.0,
                limit=self._bound.most,
                actual=len(self._handles),
                unit="requests",
            )
        ident = next(self._idents)
        handle = self._handles[ident] = Handle(self, ident, job)
        self._loop.send(Submit(ident, job, constraint, time.perf_counter()))
        return handle

    def check_fits(self, tokens: int, reused: int, answer: int) -> None:
        """Refuse a request that could never run; `submit` does, with what was really reused.

        Args:
            tokens: of the prompt.
            reused: of these, whose KV is there.
            answer: most tokens of the answer.

        Raises:
            MemoryBudget: if it needs more than `inflight_bytes` alone.
        """
        needed = together([self.needs.of(tokens, reused, answer)])
        if needed > self._settings.inflight_bytes:
            raise MemoryBudget(
                f"{tokens} tokens and an answer of up to {answer} need {needed} bytes while they are computed, more "
                f"than the server's {self._settings.inflight_bytes}; send or ask for less, or raise --inflight-bytes",
                limit=self._settings.inflight_bytes,
                actual=needed,
                unit="bytes",
            )

    def cancel(self, ident: int) -> None:
        self._loop.send(Cancel(ident))

    @property
    def decoding(self) -> bool:
        """Whether somebody's answer is being sampled. From any thread, and cheap."""
        return self._loop.decoding

    def stats(self) -> EngineStats:
        return self._loop.stats()

    async def stop(self) -> None:
        """End the thread; jobs still running fail as draining."""
        self._stopping = True
        self.text.stop()
        self._loop.send(Stop())
        await asyncio.to_thread(self._loop.join)
        await asyncio.to_thread(self._delivery.close)

    def _vocabulary(self) -> Vocabulary:
        loaded = self._loop.loaded
        assert loaded is not None
        return Vocabulary(loaded.tokenizer, loaded.spelling, loaded.choosable.count, loaded.info.eos_token_ids)

    def _tell_from_thread(self, news: News) -> None:
        self._asyncio.call_soon_threadsafe(self._hear, news)

    def _relieve_from_thread(self) -> None:
        relieved = threading.Event()

        def relieve() -> None:
            try:
                self._pressure.relieve()
            finally:
                relieved.set()

        self._asyncio.call_soon_threadsafe(relieve)
        relieved.wait(_RELIEF_SECONDS)

    def _hear(self, news: News) -> None:
        if isinstance(news, Failed) and news.for_good and not self.lost.done():
            self.lost.set_result(news.error_id)
            while self._handles:  # those that were sent since
                self._handles.popitem()[1].fail(EngineError(news.error_id))
        self._tell(not isinstance(news, Failed))

    def _deliver(self, messages: list[EventTo]) -> None:
        for ident, event in messages:
            try:
                self._push(ident, event)
            except Exception:
                error = EngineError(secrets.token_hex(6))
                log.error("engine error %s: an event can't be delivered", error.error_id, exc_info=True)
                self.cancel(ident)
                self._handles.pop(ident).fail(error)

    def _push(self, ident: int, event: Event | WarmKVError) -> None:
        handle = self._handles.get(ident)
        if handle is None:
            return  # it has had an error, and this came behind
        handle.push(event)
        if handle.phase == "done":
            del self._handles[ident]
