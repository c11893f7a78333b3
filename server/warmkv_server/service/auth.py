"""Who calls: bearer tokens, and the tenant that each stands for."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from warmkv_server.contract.fairness import Tenants
from warmkv_server.errors import AgentForbidden, OperatorError, TokenInvalid, TokenMissing

log = logging.getLogger(__name__)

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Principal:
    """A caller.

    Attributes:
        tenant: sees its own agents only, and shares no block with another.
        agent_prefix: what the agent_ids it may name begin with.
    """

    tenant: str = ""
    agent_prefix: str = ""

    def require(self, agent_id: str) -> None:
        """Raise AgentForbidden unless it may name this agent. No agent_id is always allowed."""
        if agent_id and not agent_id.startswith(self.agent_prefix):
            raise AgentForbidden(
                f"this token may only name agents whose agent_id begins with {self.agent_prefix!r}",
                agent_id=agent_id,
                agent_prefix=self.agent_prefix,
            )


class Open:
    """Lets everybody in, as one tenant."""

    def __init__(self) -> None:
        self.tenants = Tenants()

    def identify(self, metadata: Metadata) -> Principal:  # noqa: ARG002
        return Principal()


@dataclass(frozen=True)
class Trusted:
    """Lets everybody in as one tenant that the operator names: a gateway, which brings no token.

    Attributes:
        tenants: of the server, this one among them.
    """

    tenant: str
    tenants: Tenants

    def identify(self, metadata: Metadata) -> Principal:  # noqa: ARG002
        return Principal(self.tenant)


class BearerTokens:
    """Lets in who brings a known token.

    Tokens are kept and compared as digests, all of them each time, so that neither memory nor timing tells one.

    Args:
        path: of the token file: a line for each token, `TENANT TOKEN [AGENT_PREFIX]`; `#` begins a comment.
        also: a tenant that needs no token; None for none.
    """

    def __init__(self, path: Path, also: str | None = None) -> None:
        """
        Raises:
            OperatorError: if it can't be read, has a line of another form, or gives one token twice.
        """
        self._path = path
        self._also = {also} if also is not None else set()
        self._principals = _read(path)
        self.tenants = Tenants(self._count())

    def reload(self) -> str:
        """Read the file again, and name it. Calls that were let in go on, whoever may come from now on.

        Raises:
            OperatorError: as the constructor; the tokens stay what they were.
        """
        self._principals = _read(self._path)
        self.tenants.number = self._count()
        return f"the token file {self._path}"

    def identify(self, metadata: Metadata) -> Principal:
        """The principal of a call.

        Raises:
            TokenMissing, TokenInvalid
        """
        headers = [value for key, value in metadata if key == "authorization"]
        if not headers:
            raise TokenMissing("this server needs the metadata `authorization: Bearer TOKEN`")
        if len(headers) > 1:
            raise TokenInvalid("the metadata `authorization` has to be there once")
        scheme, _, token = str(headers[0]).partition(" ")
        if scheme.lower() != "bearer":
            raise TokenInvalid("the metadata `authorization` has to be `Bearer TOKEN`")
        presented, found = _digest(token.strip()), None
        for digest, principal in self._principals.items():
            if hmac.compare_digest(digest, presented):
                found = principal
        if found is None:
            raise TokenInvalid("this server does not know the token")
        return found

    def _count(self) -> int:
        """How many tenants there are."""
        return len({principal.tenant for principal in self._principals.values()} | self._also)


Auth = Open | BearerTokens | Trusted


def warn_if_open(path: Path, what: str) -> None:
    """Say so if a secret can be read or changed by everybody on this machine."""
    if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning("%s %s can be read or changed by every user of this machine: chmod o-rw it", what, path)


def _read(path: Path) -> dict[bytes, Principal]:
    """Who each token of a file stands for, by its digest."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"the token file {path} can't be read: {error}") from error
    principals: dict[bytes, Principal] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in (2, 3):
            raise OperatorError(
                f"line {number} of the token file {path} has {len(words)} words; "
                "a line is TENANT TOKEN, or TENANT TOKEN AGENT_PREFIX"
            )
        tenant, token, *prefix = words
        principal = Principal(tenant, prefix[0] if prefix else "")
        if principals.setdefault(_digest(token), principal) != principal:
            raise OperatorError(
                f"line {number} of the token file {path} has the token of an earlier line, for another tenant or "
                "other agents; give each line a token of its own"
            )
    if not principals:
        raise OperatorError(f"the token file {path} has no token, so nobody could call this server")
    warn_if_open(path, "the token file")
    return principals


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
