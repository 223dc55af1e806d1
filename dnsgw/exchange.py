"""One question on its way: what is asked, where its attempts wait, and for whom."""

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import TypeAlias


class Failure(Enum):
    """Why there is no answer."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    OVERLOADED = "overloaded"
    MALFORMED = "malformed"
    NO_UPSTREAM = "no_upstream"
    CLOSED = "closed"


Done: TypeAlias = Callable[[bytes | Failure], None]
"""Gets the answer, with an id and a spelling that are not the client's, or why there is none."""


class Exchange:
    """One question that is being asked, for everybody who waits for its answer. Its owner is the forwarder."""

    __slots__ = (
        "attempts",
        "deadline",
        "fallback",
        "first",
        "key",
        "message",
        "open",
        "question",
        "refusals",
        "tcp",
        "timer",
        "waiting",
    )

    def __init__(self, key: bytes, message: bytes, question: bytes, deadline: float, *, tcp: bool, first: int) -> None:
        """Begin with upstream `first`. `message` has no id: every attempt gets its own; `deadline` is in the loop's time."""
        self.key = key
        self.message = message
        self.question = question
        self.deadline = deadline
        self.tcp = tcp
        self.first = first
        self.attempts = 0
        self.refusals = 0
        """Attempts that failed at once: nobody listens there, or the connection was lost."""

        self.fallback: bytes | None = None
        """The best answer so far, which is an error."""

        self.open: list[tuple[Pending, int]] = []
        """Where its attempts wait for an answer."""

        self.timer: asyncio.TimerHandle | None = None
        self.waiting: list[Done] = []


Pending: TypeAlias = dict[int, Exchange]
"""The exchanges that wait for an answer at one socket, by the id of the attempt."""
