"""Which port a new allocation gets: a random one of a range, not one that was given back a moment ago."""

from collections.abc import Callable, Iterator

REST_S = 120.0
"""A port that was given back is the last choice for so long: relays that still know the old allocation by a record would
reach the new owner of its port. Twice the 60 s for which a discovery client keeps records that nobody confirms."""


class PortRange:
    """The ports of one relay address. `first` and `last` are both in it."""

    def __init__(self, first: int, last: int, randbelow: Callable[[int], int]) -> None:
        """`randbelow(n)` draws from 0…n-1 so that nobody can guess it: `secrets.randbelow` in life."""
        self.first, self.last = first, last
        self._randbelow = randbelow
        self._taken: set[int] = set()
        self._resting: dict[int, float] = {}

    def candidates(self, now: float) -> Iterator[int]:
        """Yield every port that we do not use, in random order, rested ones first. Others may be using it: try."""
        self._resting = {port: end for port, end in self._resting.items() if end > now}
        resting = []
        for port in self._shuffled():
            if port in self._resting:
                resting.append(port)
            elif port not in self._taken:
                yield port
        yield from resting

    def is_taken(self, port: int) -> bool:
        """Tell whether the port is open."""
        return port in self._taken

    def take(self, port: int) -> None:
        """Note that the port is open."""
        self._taken.add(port)
        self._resting.pop(port, None)

    def give_back(self, port: int, now: float) -> None:
        """Note that the port was closed."""
        self._taken.discard(port)
        self._resting[port] = now + REST_S

    def _shuffled(self) -> Iterator[int]:
        """Shuffle lazily: the first few are wanted, of thousands."""
        moved: dict[int, int] = {}
        for left in range(self.last - self.first + 1, 0, -1):
            at = self._randbelow(left)
            yield self.first + moved.get(at, at)
            moved[at] = moved.get(left - 1, left - 1)
