"""Every error that WarmKV answers with, in one place.

The rooms below the service raise these; `service/errors.py` maps each to a gRPC code. `reason` is what a client
switches on; the message says what is wrong and what to do about it, for a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class OperatorError(Exception):
    """A mistake in how the server was started: one sentence that says what, why, and what to do."""


class ServerFailed(Exception):
    """The server can't go on, by no mistake of its operator's: one sentence that says what, why, and what to do."""


@dataclass(frozen=True)
class Violation:
    """One wrong field of a request: its path in the message, and what it must be instead."""

    field: str
    description: str


class WarmKVError(Exception):
    """Base of all errors a request can end with.

    Attributes:
        reason: the machine-readable reason, fixed by the API.
        violations: the wrong fields, all of them, when the request itself is wrong.
        retry_after: seconds after which the same request may succeed, when waiting helps.
    """

    reason: ClassVar[str]

    def __init__(self, message: str, *, violations: Sequence[Violation] = (), retry_after: float | None = None) -> None:
        super().__init__(message)
        self.violations = tuple(violations)
        self.retry_after = retry_after


class InvalidField(WarmKVError):
    reason = "INVALID_FIELD"

    @classmethod
    def of(cls, field: str, description: str) -> InvalidField:
        return cls(f"{field}: {description}", violations=[Violation(field, description)])


class EmptyContent(WarmKVError):
    reason = "EMPTY_CONTENT"


class ContextTooLong(WarmKVError):
    reason = "CONTEXT_TOO_LONG"


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
        super().__init__(f"internal error {error_id}; the server's log has the details under this id")
        self.error_id = error_id
