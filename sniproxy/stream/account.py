"""The account of each stream: one log line and one metric sample at its end, and a row while it lives.

Relay and gateway keep the same books, under their own metric prefix and with the same stream id.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge

from sniproxy.engine import Direction
from sniproxy.stream.reason import Reason


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """One stream's account. `fields` are its log fields, in order; the times are milliseconds since it was opened."""

    stream: bytes
    fields: dict[str, object]
    _clock: Callable[[], float]
    _started: float
    state: str = "hello"
    up: Direction | None = None
    down: Direction | None = None
    detail: str = ""
    end: Callable[[], object] | None = None
    """Ends the stream from outside; set by whoever runs it."""
    _times: dict[str, float] = field(default_factory=dict)

    def mark(self, step: str) -> None:
        """Note when a step was done, as `ms_STEP`; the last time counts."""
        self._times[f"ms_{step}"] = self._ms(self._clock())

    def carry(self, *, up: Direction, down: Direction) -> None:
        """Take the byte counts from these from now on: `up` from the client, `down` to it."""
        self.up, self.down, self.state = up, down, "open"

    def _ms(self, at: float) -> float:
        return round((at - self._started) * 1000, 1)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes from the client and to it."""
        return (self.up.moved if self.up else 0, self.down.moved if self.down else 0)

    def row(self) -> dict[str, object]:
        """What is known of the stream now, as the log will say it."""
        row: dict[str, object] = {"stream": self.stream.hex(), **self.fields}
        row["bytes_up"], row["bytes_down"] = self.moved
        row |= self._times
        if self.down is not None and self.down.first_at is not None:
            row["ms_first_byte"] = self._ms(self.down.first_at)
        row["ms_total"] = self._ms(self._clock())
        return row


class Ledger:
    """All streams of one role: those that live, and the metrics of those that ended."""

    def __init__(self, role: str, registry: CollectorRegistry) -> None:
        self._log = logging.getLogger(f"crossnet.{role}")
        # Not the loop's clock: uvloop's has whole milliseconds, and is the time at which its turn began.
        self._clock = time.monotonic
        self._live: set[Account] = set()
        ended = Counter(f"crossnet_{role}_streams", "Streams that ended, by reason.", ["reason"], registry=registry)
        self._ended = {reason: ended.labels(reason.value) for reason in Reason}
        moved = Counter(
            f"crossnet_{role}_bytes",
            "Payload bytes of ended streams; up is from the client.",
            ["direction"],
            registry=registry,
        )
        self._moved = (moved.labels("up"), moved.labels("down"))
        # Not "_streams": the counter above already takes that name without its "_total" suffix.
        live = Gauge(f"crossnet_{role}_streams_live", "Streams open now.", registry=registry)
        live.set_function(lambda: len(self._live))

    def __len__(self) -> int:
        return len(self._live)

    def open(self, stream: bytes, **fields: object) -> Account:
        """Begin an account."""
        account = Account(stream=stream, fields=fields, _clock=self._clock, _started=self._clock())
        self._live.add(account)
        return account

    def close(self, account: Account, reason: Reason) -> None:
        """End an account: count it and write its log line."""
        self._live.discard(account)
        self._ended[reason].inc()
        for counter, moved in zip(self._moved, account.moved, strict=True):
            counter.inc(moved)
        row = {**account.row(), "reason": reason.value}
        if account.detail:
            row["detail"] = account.detail
        self._log.info("stream", extra={"event": row})

    def drop(self, account: Account) -> None:
        """Forget an account that turned out to be part of another stream's."""
        self._live.discard(account)

    def rows(self) -> list[dict[str, object]]:
        """The streams that live, the oldest first."""
        live = sorted(self._live, key=lambda account: account._started)
        return [{**account.row(), "state": account.state} for account in live]
