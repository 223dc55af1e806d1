"""Limits the outstanding questions about one name and type; others wait until one of them ends (RFC 5452 section 5)."""

from collections import deque
from collections.abc import Callable

from dnsgw.upstream.exchange import Exchange

MAX_ALIKE = 4  # over UDP; they differ in RD, CD, DO or the client's subnet


class OutstandingQueries:
    """The outstanding exchanges by name and type.

    `start` is called with each exchange that may begin after a wait, and must not end it before it returns.
    """

    __slots__ = ("_late", "_out", "_start")

    def __init__(self, start: Callable[[Exchange], object]) -> None:
        """Start with none."""
        self._out: dict[bytes, list[Exchange]] = {}
        self._late: dict[bytes, deque[Exchange]] = {}
        self._start = start

    def admit(self, exchange: Exchange) -> bool:
        """Return True if the exchange may begin now; False: it waits, and `start` is called later."""
        out = self._out.setdefault(exchange.query.key, [])
        if len(out) < MAX_ALIKE:
            out.append(exchange)
            return True
        self._late.setdefault(exchange.query.key, deque()).append(exchange)
        return False

    def find(self, key: bytes) -> tuple[Exchange, ...]:
        """Return the outstanding exchanges about a name and type."""
        return tuple(self._out.get(key, ()))

    def ended(self, exchange: Exchange, *, closed: bool) -> None:
        """Remove an exchange, and start the next one unless `closed`."""
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
