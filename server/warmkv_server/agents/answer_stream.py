"""An answer on its way out: what the engine says of it, in the form that the request asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

from warmkv_server.agents import talk
from warmkv_server.agents.answer_log import AnswerLog
from warmkv_server.agents.compute import Computation
from warmkv_server.agents.types import GenerateEvent, GenerateRequest, GenerateStarted, PrefillProgress
from warmkv_server.contract.calls import CallFinished, CallStatus
from warmkv_server.contract.content import ToolMode
from warmkv_server.contract.conversation import ChatState
from warmkv_server.contract.generation import Delta, Event, Finished, Progress, Started
from warmkv_server.contract.kv import BLOCK_TOKENS
from warmkv_server.errors import WarmKVError
from warmkv_server.text.reader import MessageReader, Pieces

_ID_CHARACTERS = 9
"""Of the names that the server gives to calls: as many as the strictest chat templates take, letters and digits."""


class Publisher(Protocol):
    def publish(self, event: GenerateEvent) -> None: ...


class AnswerStream:
    """Publishes the engine's events in the form the request asked for, and collects the answer where it is wanted.

    Args:
        published: the deltas that were published.

    Attributes:
        sampled: tokens so far.
        calls: that the answer has made, once it is closed.
    """

    def __init__(self, request: GenerateRequest, run: Publisher, work: Computation, published: AnswerLog) -> None:
        self._request = request
        self._run = run
        self._work = work
        self._log = AnswerLog() if request.whole else published
        self._kept = 0
        self._reading = _reading(work, calls=request.choice.mode is not ToolMode.NONE) if request.told_apart else None
        self.sampled = 0
        self.calls: tuple[CallFinished, ...] = ()
        self.started = GenerateStarted(request.key.agent_id, work.cache)

    def begin(self) -> None:
        self._run.publish(self.started)

    def follow(self, event: Event) -> None:
        match event:
            case Started():
                self.begin()
            case Progress(done, total) if not self._request.whole:
                reused = self._work.reuse.length
                # What one step computes is there before anybody could read about it.
                if done > reused and total - reused > BLOCK_TOKENS:
                    self._run.publish(PrefillProgress(done - reused, total - reused))
            case Delta():
                if not self.sampled:
                    self._work.timings.first_token = time.perf_counter() - self._request.stages.arrived
                self.sampled += len(event.token_ids)
                self._tell(event if self._reading is None else self._reading.read(event))
            case Finished():
                self._kept = len(event.completion)

    async def close(self) -> None:
        """The answer is over: tell what is left of it, and whether its calls can be executed."""
        if self._reading is not None:
            rest = self._reading.reader.finish()
            self.calls = await _judged(self._work, self._reading.reader.finished)
            last = Delta((), rest.text, (), rest.reasoning, (*rest.calls, *self.calls))
            if last != Delta((), ""):
                self._tell(last)
        if self._request.whole:
            self._run.publish(self.answer)

    @property
    def answer(self) -> Delta:
        """The answer, once it is complete, as one delta. For a request that has an id, or wants it whole."""
        joined = self._log.cut(0, len(self._log))
        return replace(joined, token_ids=joined.token_ids[: self._kept], logprobs=joined.logprobs[: self._kept])

    @property
    def reasoning_tokens(self) -> int:
        return min(self._reading.tokens, self._kept) if self._reading is not None else 0

    @property
    def conversation(self) -> ChatState:
        """What goes on behind the answer."""
        dropped = None
        if self._reading is None:
            return replace(self._work.context.conversation, calls=())
        if self._request.drops_reasoning:
            dropped = self._reading.dropped(len(self._work.context.tokens), self._work.context.thinks, self._kept)
        return talk.after_answer(self._work.context.conversation, self.calls, dropped)

    def _tell(self, delta: Delta) -> None:
        if self._request.whole:
            self._log.add(delta)
        else:
            self._run.publish(delta)


@dataclass
class AnswerReading:
    """The reader of an answer, and which of its tokens are reasoning.

    Attributes:
        tokens: of reasoning, its marks included.
        end: token behind the reasoning that the answer begins with, and the white space behind that; 0 for none.
    """

    reader: MessageReader
    tokens: int = 0
    end: int = 0
    _seen: int = 0
    _unsure: int = 0
    _behind: bool = False

    def read(self, delta: Delta) -> Delta:
        thought = self.reader.thinking
        pieces = self.reader.push(delta.text)
        self._count(len(delta.token_ids), thought, delta.text, pieces)
        return replace(delta, text=pieces.text, reasoning=pieces.reasoning, calls=tuple(pieces.calls))

    def _count(self, tokens: int, thought: bool, text: str, pieces: Pieces) -> None:
        self._seen += tokens
        thinks = self.reader.thinking
        if thought or thinks or pieces.reasoning:
            self.tokens += tokens + self._unsure
            self._unsure = 0
        else:
            self._unsure = self._unsure + tokens if self.reader.waits else 0
        over = (thought or pieces.reasoning) and not thinks
        if over and self.tokens == self._seen:
            self.end, self._behind = self._seen, True
        elif self._behind and text and not text.strip():
            self.end = self._seen
        elif text:
            self._behind = False

    def dropped(self, prompt: int, begun: int, kept: int) -> tuple[int, int] | None:
        """The tokens of the context that the next user's message drops.

        Args:
            prompt: its tokens before the answer.
            begun: of these, the last that begin the reasoning.
            kept: tokens of the answer.
        """
        return (prompt - begun, prompt + self.end) if 0 < self.end < kept else None


def _reading(work: Computation, *, calls: bool) -> AnswerReading | None:
    """How the answer is read; None where all of it is text.

    Args:
        calls: whether it may have some.
    """
    context, traits = work.context, work.tools.engine.text.traits
    tools = context.conversation.tools
    form = traits.form if tools and calls else None
    around = traits.form.around if traits.form is not None and traits.says else ()
    if form is None and traits.reasoning is None and not around:
        return None
    seed = blake2b(context.tokens.tobytes(), digest_size=16).digest()
    thinks = context.thinks > 0
    return AnswerReading(
        MessageReader(traits.reasoning, form, lambda n: _name(seed, n), thinks=thinks, tools=tools, around=around)
    )


def _name(seed: bytes, number: int) -> str:
    """A name for a call, the same whenever the same request is made of the same context."""
    letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    value = int.from_bytes(blake2b(seed + number.to_bytes(4, "little"), digest_size=16).digest(), "little")
    return "".join(letters[value // len(letters) ** n % len(letters)] for n in range(_ID_CHARACTERS))


async def _judged(work: Computation, calls: Sequence[CallFinished]) -> tuple[CallFinished, ...]:
    """The calls with what can be said of them: whether there is such a tool, and whether it takes the arguments."""
    schemas = {tool.name: tool.parameters for tool in work.context.conversation.tools}
    known = [call for call in calls if call.status is CallStatus.VALID and call.call.name in schemas]
    good: list[bool] = []
    if known:
        asked = [(schemas[call.call.name], call.call.arguments) for call in known]
        try:
            with work.run.uninterrupted():
                good = await work.tools.engine.text.satisfy(asked, work.key.tenant)
        except WarmKVError:  # a schema that takes too long, or a server that stops
            good = [False] * len(known)
    fits = {call.index: fit for call, fit in zip(known, good, strict=True)}

    def judged(call: CallFinished) -> CallFinished:
        if call.status is not CallStatus.VALID:
            return call
        if call.call.name not in schemas:
            return replace(call, status=CallStatus.UNKNOWN_TOOL)
        return call if fits[call.index] else replace(call, status=CallStatus.SCHEMA_MISMATCH)

    return tuple(judged(call) for call in calls)
