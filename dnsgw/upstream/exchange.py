"""One question to upstream: what is asked, its attempts, and who waits for the answer."""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol, TypeAlias

from dnsgw.message.question import Query
from dnsgw.upstream.address import UpstreamAddress
from dnsgw.upstream.capabilities import Capabilities


class Failure(Enum):
    """Why there is no answer."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    OVERLOADED = "overloaded"
    MALFORMED = "malformed"
    NO_UPSTREAM = "no_upstream"
    LOOP = "loop"
    CLOSED = "closed"


Done: TypeAlias = Callable[[bytes | Failure], None]
"""Called with the answer, whose id and spelling are not the client's, or with the reason why there is none."""


class QueryTarget(Protocol):
    """The part of an upstream that exchanges use."""

    destination: UpstreamAddress
    abilities: Capabilities

    def ask(self, exchange: "Exchange", now: float, *, stream: bool) -> None:
        """Make one attempt, over a connection if `stream`. Raises OSError if it fails at once."""

    def answered(self) -> None:
        """Note that it answered."""

    def failed(self, now: float) -> None:
        """Note that it did not answer, or not in time."""

    def lost_case(self, now: float) -> None:
        """Note that it does not preserve the case of names."""

    def shed(self, pending: "Pending") -> None:
        """Close the socket that these questions wait at."""


class Attempt:
    """One packet that was sent, and what its answer must match."""

    __slots__ = ("client_cookie", "edns", "exchange", "ident", "pending", "question", "source", "spelled")

    def __init__(self, exchange: "Exchange", pending: "Pending", ident: int, question: bytes) -> None:
        """Describe an attempt. `pending` belongs to the socket that it was sent from; `question` has the spelling that was sent."""
        self.exchange = exchange
        self.pending = pending
        self.ident = ident
        self.question = question
        self.spelled = False
        """The answer must have the exact spelling of the question (DNS 0x20)."""
        self.edns = True
        self.client_cookie = b""
        """The client cookie that was sent; b"": none."""
        self.source = b""
        """The address that it was sent from, packed."""


class Pending(dict[int, Attempt]):
    """The attempts that wait for an answer at one socket to `upstream`, by id."""

    __slots__ = ("stream", "unwanted", "upstream")

    def __init__(self, upstream: QueryTarget, *, stream: bool) -> None:
        """Start without attempts. `stream`: the socket is a connection, on which nobody off the path can forge."""
        super().__init__()
        self.upstream = upstream
        self.stream = stream
        self.unwanted = 0
        """Packets received that answer none of them."""


class Trust(Enum):
    """How an exchange continues with an upstream whose answers over UDP looked forged."""

    STREAM = "stream"
    """Over TCP."""

    RENEWED = "renewed"
    """TCP failed, so over UDP again with a new id and port."""


class Exchange:
    """One question that is being asked, for all clients that wait for its answer. It is owned by the forwarder."""

    __slots__ = (
        "attempts",
        "bad_cookies",
        "deadline",
        "doubted",
        "fallback",
        "forged",
        "key",
        "last",
        "no_cookie",
        "open",
        "order",
        "plain",
        "query",
        "racing",
        "refusals",
        "tcp",
        "timer",
        "trust",
        "waiting",
    )

    def __init__(self, key: bytes, query: Query, deadline: float, *, tcp: bool, order: Sequence[QueryTarget]) -> None:
        """Start without attempts. The upstreams are asked in this order, repeatedly, until `deadline` in the loop's time."""
        self.key = key
        self.query = query
        self.deadline = deadline
        self.tcp = tcp
        self.order = order
        self.racing = False
        """The last attempt may still be answered, but another upstream is to be asked as well."""

        self.attempts = 0
        self.refusals = 0
        """Attempts that failed at once: nobody listened there, or the connection was lost."""

        self.last: QueryTarget | None = None
        """The upstream that was asked last."""

        self.forged = 0
        """Answers to this question with a wrong id, at a wrong port, or of another name."""

        self.trust: dict[QueryTarget, Trust] = {}
        """How to continue with upstreams whose answers over UDP looked forged."""

        self.plain = False
        """Ask without OPT, since an upstream did not understand it."""

        self.doubted = False
        """An answer lacked a feature that the upstream supports, or may support."""

        self.no_cookie = False
        self.bad_cookies = 0
        self.fallback: bytes | None = None
        """The best answer so far, an error response."""

        self.open: list[Attempt] = []
        """The attempts that wait for an answer."""

        self.timer: asyncio.TimerHandle | None = None
        self.waiting: list[Done] = []

    def drop(self, attempt: Attempt) -> None:
        """Stop waiting for one attempt."""
        self.open.remove(attempt)
        attempt.pending.pop(attempt.ident, None)

    def forget(self, pending: Pending) -> None:
        """Stop waiting for the attempts at one socket."""
        for attempt in [attempt for attempt in self.open if attempt.pending is pending]:
            self.drop(attempt)
