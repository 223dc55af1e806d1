"""Rate limits: bytes per second of an account, and answers per second to unauthenticated clients.

No clock: `now` is monotonic seconds.
"""

import hashlib
from collections.abc import Callable
from weakref import WeakValueDictionary

from discovery.pacing.token_bucket import TokenBucket

BURST_S = 1.0
"""An account that was idle may send one second's worth at once, so that a short answer is never delayed."""

ANSWER_BUCKETS = 16_384
"""Client addresses share this many counters by a keyed hash, so memory is fixed and nobody can target the counter of another."""
ANSWERS_PER_SECOND = 20.0
ANSWER_BURST = 60.0
"""Unsigned answers over UDP to one address. A client needs two to log in; sixty clients behind one NAT may do so at once."""


class Pace:
    """The rate limit of one account, in bytes per second."""

    __slots__ = ("__weakref__", "_bucket")

    def __init__(self, rate: float, now: float) -> None:
        self._bucket: TokenBucket | None = TokenBucket(rate, rate * BURST_S, now)

    @property
    def rate(self) -> float | None:
        """Bytes per second, None if there is no limit."""
        return None if self._bucket is None else self._bucket.rate

    def reconfigure(self, rate: float | None) -> None:
        """Change the rate; None removes the limit."""
        if rate is None:
            self._bucket = None
        elif self._bucket is not None:
            self._bucket.rate, self._bucket.burst = rate, rate * BURST_S

    def spend(self, size: int, now: float) -> float:
        """Count `size` bytes that have been moved. Returns for how many seconds to pause."""
        return 0.0 if self._bucket is None else self._bucket.spend(size, now)

    def admit(self, size: int, now: float) -> bool:
        """Count `size` bytes and return True if any may be sent now. For datagrams, which are dropped rather than delayed."""
        if self._bucket is None:
            return True
        if self._bucket.left(now) <= 0:
            return False
        self._bucket.spend(size, now)
        return True


class Paces:
    """One pace per account, shared by all its allocations while it has any."""

    def __init__(self, rate: float | None) -> None:
        """`rate` is bytes per second per account, None for no limit."""
        self._rate = rate
        self._paces: WeakValueDictionary[str, Pace] = WeakValueDictionary()

    def reconfigure(self, rate: float | None) -> None:
        """Change the rate, for existing paces too."""
        self._rate = rate
        for pace in self._paces.values():
            pace.reconfigure(rate)

    def of(self, account: str, now: float) -> Pace | None:
        """Return the pace for allocations of that account, None if there is no limit."""
        if self._rate is None:
            return None
        pace = self._paces.get(account)
        if pace is None:
            pace = self._paces[account] = Pace(self._rate, now)
        return pace


class AnswerRate:
    """Limits unsigned answers to addresses that are not proved to be the client's.

    An answer is a few times as long as its request, and UDP source addresses can be forged. Without a limit, the server could be
    used to flood third parties. A client whose answer is not sent asks again, as it must over UDP anyway.
    """

    def __init__(self, key: bytes, *, rate: float = ANSWERS_PER_SECOND, burst: float = ANSWER_BURST) -> None:
        """`key` is 16 to 64 random bytes."""
        self._key = key
        self._rate = rate
        self._burst = burst
        self._buckets: dict[int, TokenBucket] = {}

    def allow(self, client: str, now: float, key_of: Callable[[str], str]) -> bool:
        """Count one answer to `client`; False if it must not be sent. Addresses with equal `key_of` count as one."""
        digest = hashlib.blake2b(key_of(client).encode(), key=self._key, digest_size=4).digest()
        number = int.from_bytes(digest, "big") % ANSWER_BUCKETS
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = TokenBucket(self._rate, self._burst, now)
        return bucket.take(1, now)
