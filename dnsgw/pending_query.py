"""A question that was not answered at once, and the replies for when there is no better answer."""

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
"""Called once for each packet: with the reply, or b"" for no reply, and with `where` as it was handed in."""


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
    Failure.LOOP: _failure(Rcode.SERVFAIL, ExtendedError.OTHER, "questions to upstream come back here: a loop"),
    Failure.CLOSED: _failure(Rcode.SERVFAIL, ExtendedError.NOT_READY, "shutting down"),
}
UNDECIDED = _failure(
    Rcode.SERVFAIL, ExtendedError.NO_REACHABLE_AUTHORITY, "upstream does not say whether it has this name"
)


class PendingQuery:
    """One question, and where its reply goes."""

    __slots__ = ("depth", "extra", "held", "host", "most", "query", "send", "tcp", "where")

    def __init__(
        self, query: Query, host: Host, send: Send, where: Any, *, tcp: bool, most: int, depth: int = 0
    ) -> None:
        """Describe a question.

        Args:
            query: what was asked.
            host: the client's address.
            send: takes the reply.
            where: handed to `send`.
            tcp: it came over a connection.
            most: largest reply over UDP, in bytes.
            depth: how many aliases led here.
        """
        self.query = query
        self.host = host
        self.send = send
        self.where = where
        self.tcp = tcp
        self.most = most
        self.depth = depth
        self.extra = 0
        """Bytes reserved for the option that is added to the reply."""

        self.held: asyncio.TimerHandle | None = None
        """Ends the wait for discovery."""

    @property
    def limit(self) -> int:
        """Largest reply in bytes."""
        return MAX_TCP_REPLY if self.tcp else min(self.query.limit, self.most) - self.extra

    def add_option(self, added: bytes) -> None:
        """Add this encoded EDNS option to the reply."""
        self.extra = len(added)
        self.send = partial(_send_with, self.send, added)

    def about(self, name: bytes, send: Send) -> "PendingQuery":
        """Return the same question about another name; its reply, of any length, goes to `send`."""
        query = retargeted(self.query, name)
        return PendingQuery(query, self.host, send, None, tcp=True, most=self.most, depth=self.depth + 1)


def _send_with(send: Send, added: bytes, reply: bytes, where: Any) -> None:
    try:
        send(with_option(reply, added) if reply else reply, where)
    except Malformed:
        send(reply, where)
