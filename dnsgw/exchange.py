"""One question on its way: what is asked, where its attempts wait, and for whom."""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol, TypeAlias


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


class Asked(Protocol):
    """An upstream, as far as an exchange knows it."""

    def ask(self, exchange: "Exchange", now: float) -> None:
        """Make one attempt. Raises OSError when it is known at once to be in vain."""

    def answered(self) -> None:
        """Note that it answered."""

    def failed(self, now: float) -> None:
        """Note that it did not answer in time, or at all."""


class Exchange:
    """One question that is being asked, for everybody who waits for its answer. Its owner is the forwarder."""

    __slots__ = (
        "attempts",
        "deadline",
        "fallback",
        "key",
        "message",
        "open",
        "order",
        "question",
        "racing",
        "refusals",
        "spelled",
        "tcp",
        "timer",
        "waiting",
    )

    def __init__(
        self,
        key: bytes,
        message: bytes,
        question: bytes,
        deadline: float,
        *,
        tcp: bool,
        order: Sequence[Asked],
        spelled: bool = False,
    ) -> None:
        """Ask the upstreams in this order, again and again, until `deadline` in the loop's time.

        `message` has no id: every attempt gets its own.
        """
        self.key = key
        self.message = message
        self.question = question
        self.deadline = deadline
        self.tcp = tcp
        self.order = order
        self.spelled = spelled
        """The answer must have the very spelling of the question (DNS 0x20)."""

        self.racing = False
        """The last attempt has more time, but another upstream is asked meanwhile."""

        self.attempts = 0
        self.refusals = 0
        """Attempts that failed at once: nobody listens there, or the connection was lost."""

        self.fallback: bytes | None = None
        """The best answer so far, which is an error."""

        self.open: list[tuple[Pending, int, Asked]] = []
        """Where its attempts wait for an answer, and whose."""

        self.timer: asyncio.TimerHandle | None = None
        self.waiting: list[Done] = []


Pending: TypeAlias = dict[int, Exchange]
"""The exchanges that wait for an answer at one socket, by the id of the attempt."""
