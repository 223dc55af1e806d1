"""A question that was not answered at once: who waits for what, and what is said when there is no better answer."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from dnsgw.client_limits import Host
from dnsgw.message.compose import retargeted, with_option
from dnsgw.message.names import Malformed
from dnsgw.message.question import MAX_TCP_REPLY, ExtendedError, Query, Rcode, extended_error
from dnsgw.message.reply import Answer
from dnsgw.upstream.exchange import Failure

Send: TypeAlias = Callable[[bytes, Any], None]
"""Called once for each packet handled: with the reply, or with nothing when nothing is to be said, and with `where`."""


def _failure(rcode: Rcode, code: ExtendedError, why: str) -> Answer:
    return Answer(rcode, authoritative=False, options=extended_error(code, why))


REFUSED = Answer(Rcode.REFUSED, authoritative=False)
FORMAT_ERROR = Answer(Rcode.FORMERR, authoritative=False)
TOO_MANY = _failure(Rcode.REFUSED, ExtendedError.OTHER, "too many questions in one second")
FAILURES = {
    Failure.TIMEOUT: _failure(Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "no upstream answered in time"),
    Failure.UNREACHABLE: _failure(Rcode.SERVFAIL, ExtendedError.NETWORK_ERROR, "no upstream can be reached"),
    Failure.NO_UPSTREAM: _failure(Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "no upstream is configured"),
    Failure.OVERLOADED: _failure(Rcode.REFUSED, ExtendedError.OTHER, "too many questions wait for an upstream"),
    Failure.MALFORMED: _failure(Rcode.SERVFAIL, ExtendedError.NETWORK_ERROR, "upstream's answer is malformed"),
    Failure.LOOP: _failure(Rcode.SERVFAIL, ExtendedError.OTHER, "what upstream is asked comes back here: a loop"),
    Failure.CLOSED: _failure(Rcode.SERVFAIL, ExtendedError.NOT_READY, "shutting down"),
}
UNDECIDED = _failure(
    Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "upstream does not say whether it has this name"
)


class PendingQuery:
    """One question and the way of its reply."""

    __slots__ = ("depth", "extra", "held", "host", "most", "query", "send", "tcp", "where")

    def __init__(
        self, query: Query, host: Host, send: Send, where: Any, *, tcp: bool, most: int, depth: int = 0
    ) -> None:
        """Note what was asked and by whom; `depth`: how many aliases led here."""
        self.query = query
        self.host = host
        self.send = send
        self.where = where
        self.tcp = tcp
        self.most = most
        self.depth = depth
        self.extra = 0
        """Bytes to leave for what is added to the reply."""

        self.held: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        """Bytes that the reply may have."""
        return MAX_TCP_REPLY if self.tcp else min(self.query.limit, self.most) - self.extra

    def add_option(self, added: bytes) -> None:
        """Have this encoded option go with the reply."""
        self.extra = len(added)
        self.send = partial(_send_with, self.send, added)

    def about(self, name: bytes, send: Send) -> "PendingQuery":
        """The same question about another name, whose reply of any length goes to `send`. Raises Malformed."""
        query = retargeted(self.query, name)
        return PendingQuery(query, self.host, send, None, tcp=True, most=self.most, depth=self.depth + 1)


def _send_with(send: Send, added: bytes, reply: bytes, where: Any) -> None:
    try:
        send(with_option(reply, added) if reply else reply, where)
    except Malformed:
        send(reply, where)
