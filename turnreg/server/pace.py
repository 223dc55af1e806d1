"""How fast: bytes per second of an account, and answers per second to strangers.

No clock: `now` is monotonic seconds.
"""

import hashlib
from collections.abc import Callable
from weakref import WeakValueDictionary

from discovery.pacing.token_bucket import TokenBucket

BURST_S = 1.0
"""An account that was quiet may send what a second holds at once, so that a short answer is never slowed down."""

ANSWER_BUCKETS = 16_384
"""Client addresses share this many counters by a keyed hash: the memory is fixed, and nobody can aim at another's counter."""
ANSWERS_PER_SECOND = 20.0
ANSWER_BURST = 60.0
"""Unsigned answers over UDP to one address. A client needs two to log in; behind one NAT sixty may do so at once."""


class Pace:
    """How fast an account may send, in bytes per second. What is sent beyond it has to be waited for."""

    __slots__ = ("__weakref__", "_bucket")

    def __init__(self, rate: float, now: float) -> None:
        self._bucket: TokenBucket | None = TokenBucket(rate, rate * BURST_S, now)

    @property
    def rate(self) -> float | None:
        """Bytes per second, None where there is no limit."""
        return None if self._bucket is None else self._bucket.rate

    def reconfigure(self, rate: float | None) -> None:
        """Go by another rate; None: there is no limit any more."""
        if rate is None:
            self._bucket = None
        elif self._bucket is not None:
            self._bucket.rate, self._bucket.burst = rate, rate * BURST_S

    def spend(self, size: int, now: float) -> float:
        """Count `size` bytes that are moved already; returns for how many seconds to move no more."""
        return 0.0 if self._bucket is None else self._bucket.spend(size, now)

    def admit(self, size: int, now: float) -> bool:
        """Count `size` bytes if any may be sent now: for datagrams, which are dropped rather than kept waiting."""
        if self._bucket is None:
            return True
        if self._bucket.left(now) <= 0:
            return False
        self._bucket.spend(size, now)
        return True


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
            pace.reconfigure(rate)

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
        self._buckets: dict[int, TokenBucket] = {}

    def allow(self, client: str, now: float, key_of: Callable[[str], str]) -> bool:
        """Take one answer for `client`; `key_of` says which addresses count as one."""
        digest = hashlib.blake2b(key_of(client).encode(), key=self._key, digest_size=4).digest()
        number = int.from_bytes(digest, "big") % ANSWER_BUCKETS
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = TokenBucket(self._rate, self._burst, now)
        return bucket.take(1, now)
