"""Every error that WarmKV answers with, in one place.

The rooms below the service raise these; `service/errors.py` maps each to a gRPC code. `reason` is what a client
switches on; the message says what is wrong and what to do about it, for a person.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


class OperatorError(Exception):
    """A mistake in how the server was started: one sentence that says what, why, and what to do."""


class ServerFailed(Exception):
    """The server can't go on, by no mistake of its operator's: one sentence that says what, why, and what to do."""


About = str | int | float | None

METADATA = {
    "field": "path of the wrong field, the first of them",
    "limit": "what is allowed",
    "actual": "what came, or would be",
    "unit": "of `limit` and `actual`",
    "agent_id": "the agent that the message speaks of",
    "agent_prefix": "what the caller's agent_ids begin with",
    "request_id": "the request that the message speaks of",
    "revision": "the agent's revision; 0 where there is none",
    "expected_revision": "the request's",
    "error_id": "what to look for in the server's log",
    "retry_delay": "seconds to wait, as `1.5s`",
}
"""What an error can say to programs, and what each means. The contract's comments list the same."""


@dataclass(frozen=True)
class Violation:
    """One wrong field of a request: its path in the message, and what it must be instead.

    Attributes:
        about: what else there is to say to programs; see METADATA.
    """

    field: str
    description: str
    about: Mapping[str, About] = dataclasses.field(default_factory=dict)


class WarmKVError(Exception):
    """Base of all errors a request can end with.

    Attributes:
        reason: the machine-readable reason, fixed by the API.
        violations: the wrong fields, all of them, when the request itself is wrong.
        retry_after: seconds after which the same request may succeed, when waiting helps.
        metadata: what the message says, for programs, by the names in METADATA; of several wrong fields, of the first.
    """

    reason: ClassVar[str]

    def __init__(
        self, message: str, *, violations: Sequence[Violation] = (), retry_after: float | None = None, **about: About
    ) -> None:
        super().__init__(message)
        self.violations = tuple(violations)
        self.retry_after = retry_after
        first = {"field": self.violations[0].field, **self.violations[0].about} if self.violations else {}
        delay = {"retry_delay": f"{retry_after:g}s"} if retry_after is not None else {}
        told = {**first, **about, **delay}
        assert told.keys() <= METADATA.keys(), told
        self.metadata = {name: str(value) for name, value in told.items() if value is not None}


class InvalidField(WarmKVError):
    reason = "INVALID_FIELD"

    @classmethod
    def of(cls, field: str, description: str, **about: About) -> InvalidField:
        return cls(f"{field}: {description}", violations=[Violation(field, description, about)])


class EmptyContent(WarmKVError):
    reason = "EMPTY_CONTENT"


class ContextTooLong(WarmKVError):
    reason = "CONTEXT_TOO_LONG"


class ConstraintTooComplex(WarmKVError):
    """A response format takes too much to prepare, found before anything was computed."""

    reason = "CONSTRAINT_TOO_COMPLEX"


class ConstraintRanOut(WarmKVError):
    """A response format took too much for a token of the answer, in its midst."""

    reason = "CONSTRAINT_TOO_COMPLEX"


class MalformedMessage(WarmKVError):
    reason = "MALFORMED_MESSAGE"


class AgentNotFound(WarmKVError):
    reason = "AGENT_NOT_FOUND"


class AgentExists(WarmKVError):
    reason = "AGENT_EXISTS"


class RequestIdReused(WarmKVError):
    reason = "REQUEST_ID_REUSED"


class OutcomeUnreadable(WarmKVError):
    reason = "OUTCOME_UNREADABLE"


class NotDurable(WarmKVError):
    reason = "NOT_DURABLE"


class Unsupported(WarmKVError):
    reason = "UNSUPPORTED"


class ToolsChanged(WarmKVError):
    reason = "TOOLS_CHANGED"


class NoPendingCall(WarmKVError):
    reason = "NO_PENDING_CALL"


class RevisionMismatch(WarmKVError):
    reason = "REVISION_MISMATCH"


class AgentDeleted(WarmKVError):
    reason = "AGENT_DELETED"


class RequestCancelled(WarmKVError):
    reason = "REQUEST_CANCELLED"


class QueueFull(WarmKVError):
    reason = "QUEUE_FULL"


class MemoryBudget(WarmKVError):
    reason = "MEMORY_BUDGET"


class MessageTooLarge(WarmKVError):
    reason = "MESSAGE_TOO_LARGE"


class TokenMissing(WarmKVError):
    reason = "TOKEN_MISSING"


class TokenInvalid(WarmKVError):
    reason = "TOKEN_INVALID"


class AgentForbidden(WarmKVError):
    reason = "AGENT_FORBIDDEN"


class Draining(WarmKVError):
    reason = "DRAINING"


class Loading(WarmKVError):
    reason = "LOADING"


class StorageUnavailable(WarmKVError):
    reason = "STORAGE_UNAVAILABLE"


class EngineError(WarmKVError):
    """Something broke inside. The message carries an id that the log also has, and nothing else."""

    reason = "ENGINE_ERROR"

    def __init__(self, error_id: str) -> None:
        super().__init__(
            f"internal error {error_id}; the server's log has the details under this id", error_id=error_id
        )
        self.error_id = error_id
