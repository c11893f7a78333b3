"""An answer as it grows, for readers of any speed, in few bytes a token.

What a reader has yet to read is never copied for it: it has a place in the one log. So an answer that nobody reads
costs the same as one that many read slowly, and no more than its tokens, its characters and its log probabilities.
"""

from __future__ import annotations

import io
from array import array
from bisect import bisect_left

from warmkv_server.agents.types import GenerateEvent, GenerateFinished, GenerateStarted, PrefillProgress
from warmkv_server.contract.calls import CallArguments, CallNews
from warmkv_server.contract.generation import Delta, Logprobs

JOIN_BEHIND = 256
"""Deltas that a reader may be behind before those that it hasn't read are joined."""

JOINED = 1024
"""Most deltas that are joined to one: a message must stay within what clients take."""


class AnswerLog:
    """Deltas, kept as what they have in them. Any run of them can be had as one."""

    def __init__(self) -> None:
        self._dropped = 0
        self.clear()

    def __len__(self) -> int:
        return self._dropped + len(self._token_ends)

    def clear(self) -> None:
        """Forget what is there; deltas keep their numbers."""
        if hasattr(self, "_token_ends"):
            self._dropped = len(self)
        self._ids = array("i")
        self._text = io.StringIO()
        self._reasoning = io.StringIO()
        self._calls: list[tuple[int, CallNews]] = []
        self._token_ends = array("i")
        self._text_ends = array("i")
        self._reasoning_ends = array("i")
        self._logprobs = array("d")
        self._top_ids = array("i")
        self._top_logprobs = array("d")

    def add(self, delta: Delta) -> None:
        self._ids.extend(delta.token_ids)
        self._calls.extend((len(self._token_ends), news) for news in delta.calls)
        self._token_ends.append(len(self._ids))
        for texts, ends, text in (
            (self._text, self._text_ends, delta.text),
            (self._reasoning, self._reasoning_ends, delta.reasoning),
        ):
            texts.seek(0, io.SEEK_END)
            texts.write(text)
            ends.append(texts.tell())
        for each in delta.logprobs:  # of every token, with as many alternatives, or of none
            self._logprobs.append(each.logprob)
            self._top_ids.extend(token for token, _ in each.top)
            self._top_logprobs.extend(logprob for _, logprob in each.top)

    def cut(self, first: int, last: int) -> Delta:
        """The deltas [first, last) as one."""
        first, last = first - self._dropped, last - self._dropped
        assert 0 <= first <= last
        start, end = (self._token_ends[n - 1] if n else 0 for n in (first, last))
        text = _between(self._text, self._text_ends, first, last)
        reasoning = _between(self._reasoning, self._reasoning_ends, first, last)
        calls = self._news(first, last) if self._calls else ()
        return Delta(tuple(self._ids[start:end]), text, self._told(start, end), reasoning, calls)

    def _news(self, first: int, last: int) -> tuple[CallNews, ...]:
        """The news of calls in the deltas [first, last), pieces of the same arguments joined."""
        begin, end = (bisect_left(self._calls, n, key=lambda entry: entry[0]) for n in (first, last))
        found: list[CallNews] = []
        pieces: list[str] = []
        for _, news in self._calls[begin:end]:
            if isinstance(news, CallArguments) and found and isinstance(found[-1], CallArguments):
                pieces.append(news.text)
                continue
            _join(found, pieces)
            found.append(news)
        _join(found, pieces)
        return tuple(found)

    def _told(self, start: int, end: int) -> tuple[Logprobs, ...]:
        if not self._logprobs:
            return ()
        count = len(self._top_ids) // len(self._logprobs)
        found = []
        for token in range(start, end):
            ids = self._top_ids[token * count : (token + 1) * count]
            values = self._top_logprobs[token * count : (token + 1) * count]
            found.append(Logprobs(self._ids[token], self._logprobs[token], tuple(zip(ids, values, strict=True))))
        return tuple(found)


def _between(texts: io.StringIO, ends: array[int], first: int, last: int) -> str:
    start, end = (ends[n - 1] if n else 0 for n in (first, last))
    texts.seek(start)
    return texts.read(end - start)


def _join(found: list[CallNews], pieces: list[str]) -> None:
    """Put more pieces of arguments, which are of one call, behind the last one."""
    if pieces:
        first = found[-1]
        assert isinstance(first, CallArguments)
        found[-1] = CallArguments(first.index, first.text + "".join(pieces))
        pieces.clear()


class AnswerEvents:
    """The events of one Generate: GenerateStarted, the latest progress, the answer's deltas, GenerateFinished.

    Args:
        keep: what all readers have read, for one that joins later; without it, that is dropped.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._readers: list[AnswerReader] = []
        self.started: GenerateStarted | None = None
        self.progress: PrefillProgress | None = None
        self.finished: GenerateFinished | None = None
        self.answer = AnswerLog()

    def add(self, event: GenerateEvent) -> None:
        match event:
            case GenerateStarted():
                self.started = event
            case PrefillProgress():
                self.progress = event
            case Delta():
                self.answer.add(event)
            case GenerateFinished():
                self.finished = event

    def reader(self) -> AnswerReader:
        reader = AnswerReader(self)
        self._readers.append(reader)
        return reader

    def leave(self, reader: AnswerReader) -> None:
        self._readers.remove(reader)
        self.drop_read()

    def drop_read(self) -> None:
        """Forget the answer so far once everybody has read all of it, unless somebody may still join."""
        if not self._keep and all(reader.read == len(self.answer) for reader in self._readers):
            self.answer.clear()


class AnswerReader:
    """One reader's place.

    Attributes:
        read: deltas that it has had.
    """

    def __init__(self, events: AnswerEvents) -> None:
        self._events = events
        self._started = self._finished = False
        self._progress: PrefillProgress | None = None
        self.read = 0

    def next(self) -> list[GenerateEvent]:
        """What comes next for it; empty if there is nothing yet, or nothing more."""
        events = self._events
        behind = len(events.answer) - self.read
        if events.started is not None and not self._started:
            self._started = True
            return [events.started]
        if events.progress is not None and events.progress is not self._progress and not len(events.answer):
            self._progress = events.progress
            return [events.progress]
        if behind:
            first, self.read = self.read, self.read + (min(behind, JOINED) if behind > JOIN_BEHIND else 1)
            delta = events.answer.cut(first, self.read)
            events.drop_read()
            return [delta]
        if events.finished is not None and not self._finished:
            self._finished = True
            return [events.finished]
        return []
