"""An answer, put together from the events of a Generate."""

from __future__ import annotations

from dataclasses import dataclass, field

from warmkv import v1


@dataclass
class Answer:
    """What has come of an answer; all of it once it is over.

    Attributes:
        started: the first event.
        finished: the last one, sent when the answer is committed; empty until then.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    started: v1.GenerateStarted = field(default_factory=v1.GenerateStarted)
    finished: v1.GenerateFinished = field(default_factory=v1.GenerateFinished)

    @property
    def cache(self) -> v1.CacheReport:
        """What was reused and what was computed."""
        return self.finished.cache

    @property
    def agent(self) -> v1.Agent:
        """The agent after the commit."""
        return self.finished.agent

    def add(self, event: v1.GenerateResponse) -> None:
        match event.WhichOneof("event"):
            case "started":
                self.started = event.started
            case "delta":
                self.text += event.delta.text
                self.token_ids += event.delta.token_ids
            case "finished":
                self.finished = event.finished
