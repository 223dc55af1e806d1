"""One question on its way: what is asked, where its attempts wait, and for whom."""

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
"""Gets the answer, with an id and a spelling that are not the client's, or why there is none."""


class QueryTarget(Protocol):
    """An upstream, as far as an exchange knows it."""

    destination: UpstreamAddress
    abilities: Capabilities

    def ask(self, exchange: "Exchange", now: float, *, stream: bool) -> None:
        """Make one attempt, over a connection if `stream`. Raises OSError when it is known at once to be in vain."""

    def answered(self) -> None:
        """Note that it answered."""

    def failed(self, now: float) -> None:
        """Note that it did not answer in time, or at all."""

    def lost_case(self, now: float) -> None:
        """Note that it does not keep the case of names."""

    def shed(self, pending: "Pending") -> None:
        """Close the socket of this."""


class Attempt:
    """One packet that was sent, and what its answer must have."""

    __slots__ = ("client_cookie", "edns", "exchange", "ident", "pending", "question", "source", "spelled")

    def __init__(self, exchange: "Exchange", pending: "Pending", ident: int, question: bytes) -> None:
        """Note what was asked and where its answer comes in; `question` has the spelling that was sent."""
        self.exchange = exchange
        self.pending = pending
        self.ident = ident
        self.question = question
        self.spelled = False
        """The answer must have the very spelling of the question (DNS 0x20)."""
        self.edns = True
        self.client_cookie = b""
        """Our half of the cookie that was sent; empty: none was."""
        self.source = b""
        """The address that it was sent from."""


class Pending(dict[int, Attempt]):
    """What waits for an answer at one socket, by id. `upstream` is whose socket it is."""

    __slots__ = ("stream", "unwanted", "upstream")

    def __init__(self, upstream: QueryTarget, *, stream: bool) -> None:
        """Start without pending questions. `stream`: a connection, on which nobody off the path can forge."""
        super().__init__()
        self.upstream = upstream
        self.stream = stream
        self.unwanted = 0
        """Packets that came and answer nothing here."""


class Trust(Enum):
    """How an exchange goes on with an upstream whose answers over UDP looked forged."""

    STREAM = "stream"
    RENEWED = "renewed"
    """TCP failed: by UDP after all, with a new id and port."""


class Exchange:
    """One question that is being asked, for everybody who waits for its answer. Its owner is the forwarder."""

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
        """Ask the upstreams in this order, again and again, until `deadline` in the loop's time."""
        self.key = key
        self.query = query
        self.deadline = deadline
        self.tcp = tcp
        self.order = order
        self.racing = False
        """The last attempt has more time, but another upstream is asked meanwhile."""

        self.attempts = 0
        self.refusals = 0
        """Attempts that failed at once: nobody listens there, or the connection was lost."""

        self.last: QueryTarget | None = None
        """Who was asked last."""

        self.forged = 0
        """Answers to this question with a wrong id, at a wrong port, or of another name."""

        self.trust: dict[QueryTarget, Trust] = {}
        """The upstreams whose answers over UDP looked forged."""

        self.plain = False
        """Ask without OPT: somebody did not understand it."""

        self.doubted = False
        """An answer came that lacked what the upstream can do, or is not known to be unable to do."""

        self.no_cookie = False
        self.bad_cookies = 0
        self.fallback: bytes | None = None
        """The best answer so far, which is an error."""

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
