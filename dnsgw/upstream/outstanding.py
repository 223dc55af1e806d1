"""How many questions about one name and type are out at a time; the others wait for their end (RFC 5452 section 5)."""

from collections import deque
from collections.abc import Callable

from dnsgw.upstream.exchange import Exchange

MAX_ALIKE = 4  # over UDP; they differ in RD, CD, DO or a subnet that is passed on


class OutstandingQueries:
    """The exchanges that are out, by name and type.

    `start` is called with each that is let out after its wait, and must not end it at once.
    """

    __slots__ = ("_late", "_out", "_start")

    def __init__(self, start: Callable[[Exchange], object]) -> None:
        """Begin with none."""
        self._out: dict[bytes, list[Exchange]] = {}
        self._late: dict[bytes, deque[Exchange]] = {}
        self._start = start

    def admit(self, exchange: Exchange) -> bool:
        """Let this out, or have it wait: False."""
        out = self._out.setdefault(exchange.query.key, [])
        if len(out) < MAX_ALIKE:
            out.append(exchange)
            return True
        self._late.setdefault(exchange.query.key, deque()).append(exchange)
        return False

    def find(self, key: bytes) -> tuple[Exchange, ...]:
        """What is out about this name and type."""
        return tuple(self._out.get(key, ()))

    def ended(self, exchange: Exchange, *, closed: bool) -> None:
        """Count this out and let the next one out, unless all is `closed`."""
        key = exchange.query.key
        out, late = self._out.get(key, []), self._late.get(key)
        if exchange in out:
            out.remove(exchange)
        elif late is not None and exchange in late:
            late.remove(exchange)
        while late and len(out) < MAX_ALIKE and not closed:
            out.append(late.popleft())
            self._start(out[-1])
        if not late:
            self._late.pop(key, None)
        if not out and not late:
            self._out.pop(key, None)
