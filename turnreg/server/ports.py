"""Choosing the port of a new allocation: a random one of a range that was not used recently."""

from collections.abc import Callable, Iterator

REST_S = 120.0
"""For this long, a port that was released is used only if no other is free: relays that still have the record of the old allocation
would reach the new owner of its port. Twice the 60 s for which a discovery client keeps unconfirmed records."""


class PortRange:
    """The ports of one relay address, from `first` to `last` inclusive."""

    def __init__(self, first: int, last: int, randbelow: Callable[[int], int]) -> None:
        """`randbelow(n)` returns an unpredictable number from 0 to n-1; in production it is `secrets.randbelow`."""
        self.first, self.last = first, last
        self._randbelow = randbelow
        self._taken: set[int] = set()
        self._resting: dict[int, float] = {}

    def candidates(self, now: float) -> Iterator[int]:
        """Yield every port that we do not use, in random order, those released recently last. Other programs may use it."""
        self._resting = {port: end for port, end in self._resting.items() if end > now}
        resting = []
        for port in self._shuffled():
            if port in self._resting:
                resting.append(port)
            elif port not in self._taken:
                yield port
        yield from resting

    def is_taken(self, port: int) -> bool:
        """Tell whether the port is in use by us."""
        return port in self._taken

    def take(self, port: int) -> None:
        """Record that the port was opened."""
        self._taken.add(port)
        self._resting.pop(port, None)

    def give_back(self, port: int, now: float) -> None:
        """Record that the port was closed."""
        self._taken.discard(port)
        self._resting[port] = now + REST_S

    def _shuffled(self) -> Iterator[int]:
        """Shuffle lazily: only the first few of thousands are needed."""
        moved: dict[int, int] = {}
        for left in range(self.last - self.first + 1, 0, -1):
            at = self._randbelow(left)
            yield self.first + moved.get(at, at)
            moved[at] = moved.get(left - 1, left - 1)
