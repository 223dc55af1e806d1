"""How fast: bytes per second of an account, and answers per second to strangers.

No clock: `now` is monotonic seconds.
"""

import hashlib
from collections.abc import Callable
from weakref import WeakValueDictionary

BURST_S = 1.0
"""An account that was quiet may send what a second holds at once, so that a short answer is never slowed down."""

ANSWER_BUCKETS = 16_384
"""Client addresses share this many counters by a keyed hash: the memory is fixed, and nobody can aim at another's counter."""
ANSWERS_PER_SECOND = 20.0
ANSWER_BURST = 60.0
"""Unsigned answers over UDP to one address. A client needs two to log in; behind one NAT sixty may do so at once."""


class Pace:
    """A bucket that fills with `rate` bytes per second. What is spent beyond it has to be waited for."""

    __slots__ = ("__weakref__", "_at", "_left", "rate")

    def __init__(self, rate: float, now: float) -> None:
        self.rate: float | None = rate
        """None: there is no limit any more."""
        self._left = rate * BURST_S
        self._at = now

    def spend(self, size: int, now: float) -> float:
        """Take `size` bytes that are moved already; returns for how many seconds to move no more."""
        if self.rate is None:
            return 0.0
        self._fill(self.rate, now)
        self._left -= size
        return max(0.0, -self._left / self.rate)

    def admit(self, size: int, now: float) -> bool:
        """Take `size` bytes if there are any left: for datagrams, which are dropped rather than kept waiting."""
        if self.rate is None:
            return True
        self._fill(self.rate, now)
        if self._left <= 0:
            return False
        self._left -= size
        return True

    def _fill(self, rate: float, now: float) -> None:
        self._left = min(rate * BURST_S, self._left + (now - self._at) * rate)
        self._at = now


class Paces:
    """One pace an account, shared by all its allocations for as long as it has any."""

    def __init__(self, rate: float | None) -> None:
        """`rate` is bytes per second of an account, None for no limit."""
        self._rate = rate
        self._paces: WeakValueDictionary[str, Pace] = WeakValueDictionary()

    def reconfigure(self, rate: float | None) -> None:
        """Go by another rate, also where a pace is kept already."""
        self._rate = rate
        for pace in self._paces.values():
            pace.rate = rate

    def of(self, account: str, now: float) -> Pace | None:
        """Return the pace that an allocation of that account has to keep, None if there is no limit."""
        if self._rate is None:
            return None
        pace = self._paces.get(account)
        if pace is None:
            pace = self._paces[account] = Pace(self._rate, now)
        return pace


class AnswerRate:
    """Says whether one more unsigned answer may go to an address that nobody has vouched for.

    An answer is a few times as long as the request and UDP sources can be forged, so that without a bound the server
    could be made to flood somebody. A client whose answer is not sent asks again, as over UDP it must anyway.
    """

    def __init__(self, key: bytes, *, rate: float = ANSWERS_PER_SECOND, burst: float = ANSWER_BURST) -> None:
        """`key` is 16 to 64 random bytes."""
        self._key = key
        self._rate = rate
        self._burst = burst
        self._buckets: dict[int, tuple[float, float]] = {}

    def allow(self, client: str, now: float, key_of: Callable[[str], str]) -> bool:
        """Take one answer for `client`; `key_of` says which addresses count as one."""
        digest = hashlib.blake2b(key_of(client).encode(), key=self._key, digest_size=4).digest()
        bucket = int.from_bytes(digest, "big") % ANSWER_BUCKETS
        left, at = self._buckets.get(bucket, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        if left < 1:
            self._buckets[bucket] = (left, now)
            return False
        self._buckets[bucket] = (left - 1, now)
        return True
