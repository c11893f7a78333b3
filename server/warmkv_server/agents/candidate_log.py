"""Several answers as they grow: a log of each, which readers of any speed share."""

from __future__ import annotations

from collections.abc import Iterator

from warmkv_server.agents.answer_log import JOIN_BEHIND, JOINED, AnswerLog
from warmkv_server.agents.types import (
    CandidateDelta,
    GenerateEvent,
    GenerateFinished,
    GenerateStarted,
    PrefillProgress,
)


class CandidateEvents:
    """The events of one Generate with candidates: GenerateStarted, the latest progress, deltas, GenerateFinished."""

    def __init__(self, candidates: int) -> None:
        self.started: GenerateStarted | None = None
        self.progress: PrefillProgress | None = None
        self.finished: GenerateFinished | None = None
        self.answers = [AnswerLog() for _ in range(candidates)]

    def add(self, event: GenerateEvent) -> None:
        match event:
            case GenerateStarted():
                self.started = event
            case PrefillProgress():
                self.progress = event
            case CandidateDelta(number, delta):
                self.answers[number].add(delta)
            case GenerateFinished():
                self.finished = event

    def reader(self) -> CandidateReader:
        return CandidateReader(self)

    def leave(self, reader: CandidateReader) -> None:
        """Nothing is dropped before the end: there is one reader, and no other may join."""


class CandidateReader:
    def __init__(self, events: CandidateEvents) -> None:
        self._events = events
        self._read = [0] * len(events.answers)
        self._seen: list[GenerateEvent] = []

    def next(self) -> list[GenerateEvent]:
        """The next event that it hasn't had; empty if there is none yet."""
        event = next(self._unread(), None)
        return [event] if event is not None else []

    def _unread(self) -> Iterator[GenerateEvent]:
        events = self._events
        for once in (events.started, events.progress if not any(self._read) else None):
            if once is not None and once not in self._seen:
                self._seen = [*self._seen[:1], once]
                yield once
        for number, log in enumerate(events.answers):
            first = self._read[number]
            behind = len(log) - first
            if behind:
                last = first + (1 if behind <= JOIN_BEHIND else min(behind, JOINED))
                self._read[number] = last
                yield CandidateDelta(number, log.cut(first, last))
        if events.finished is not None and events.finished not in self._seen:
            self._seen.append(events.finished)
            yield events.finished
