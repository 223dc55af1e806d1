"""The record of each stream: a row while it is open, one log line and one metric sample at its end.

Relay and gateway keep the same records, each with its own metric prefix, and with the same stream id.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sniproxy.engine import CopyDirection
from sniproxy.streams.end_reason import Reason

MAX_ENDED = 256
"""Ended streams kept for inspection: enough to see what just went wrong, in a few hundred kilobytes."""

MAX_NETWORKS = 256
"""Networks with their own metric samples, as many as a large mesh has. Further ones are counted together as `_other`."""

STEPS = {
    "hello": "From accept to the end of the ClientHello.",
    "route": "From the ClientHello to the candidates.",
    "connect": "From there to a service that is connected.",
    "first_byte": "From accept to the first byte for the client.",
}
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Half a millisecond is a hop on one machine; 3, 5 and 10 s are the deadlines of a dial, a ClientHello and a gateway's answer."""


@dataclass(slots=True, kw_only=True, eq=False)
class StreamRecord:
    """The record of one stream. `fields` are its log fields, in order; times are milliseconds since the record was opened."""

    stream: bytes
    fields: dict[str, object]
    _clock: Callable[[], float]
    _started: float
    state: str = "hello"
    up: CopyDirection | None = None
    down: CopyDirection | None = None
    detail: str = ""
    end: Callable[[], object] | None = None
    """Ends the stream from outside; set by the owner of the stream."""
    is_evicted: bool = False
    """It was ended to make room for another one."""
    _times: dict[str, float] = field(default_factory=dict)

    def mark(self, step: str) -> None:
        """Note that a step is complete, as `ms_STEP`. A repeated step replaces the time."""
        self._times[f"ms_{step}"] = self._ms(self._clock())

    def carry(self, *, up: CopyDirection, down: CopyDirection) -> None:
        """Take the byte counts from these directions: `up` from the client, `down` to the client."""
        self.up, self.down, self.state = up, down, "open"

    def stop(self, detail: str) -> None:
        """End the stream from outside: both peers see a reset, and the log says why."""
        if self.end is not None:
            self.detail = self.detail or detail
            self.end()

    def evict(self, detail: str) -> None:
        """End the stream to make room for another one."""
        self.is_evicted = True
        self.stop(detail)

    @property
    def last_moved(self) -> float:
        """When the stream last moved a byte, in the loop's time. Only while it is open."""
        assert self.up is not None
        return self.up.activity.last

    def seconds(self) -> dict[str, float]:
        """Return how long each completed step took, in seconds, by the names in STEPS."""
        took = {}
        before = 0.0
        for step in ("hello", "route", "connect"):
            at = self._times.get(f"ms_{step}")
            if at is not None:
                took[step] = max(0.0, at - before) / 1000
                before = at
        if self.down is not None and self.down.first_at is not None:
            took["first_byte"] = max(0.0, self.down.first_at - self._started)
        return took

    def _ms(self, at: float) -> float:
        return round((at - self._started) * 1000, 1)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes from the client and to the client."""
        return (self.up.moved if self.up else 0, self.down.moved if self.down else 0)

    def row(self) -> dict[str, object]:
        """Return what is known of the stream now, in the form of its log line."""
        row: dict[str, object] = {"stream": self.stream.hex(), **self.fields}
        row["bytes_up"], row["bytes_down"] = self.moved
        row |= self._times
        if self.down is not None and self.down.first_at is not None:
            row["ms_first_byte"] = self._ms(self.down.first_at)
        row["ms_total"] = self._ms(self._clock())
        return row


class StreamLog:
    """The records of all streams of one role: the open ones, and the metrics of those that have ended."""

    def __init__(self, role: str, registry: CollectorRegistry) -> None:
        self._log = logging.getLogger(f"crossnet.{role}")
        # Not the loop's clock: uvloop's has whole milliseconds, and stands still during a pass of the loop.
        self._clock = time.monotonic
        self._live: set[StreamRecord] = set()
        ended = Counter(f"crossnet_{role}_streams", "Streams that ended, by reason.", ["reason"], registry=registry)
        self._ended = {reason: ended.labels(reason.value) for reason in Reason}
        moved = Counter(
            f"crossnet_{role}_bytes",
            "Payload bytes of ended streams; up is from the client.",
            ["direction"],
            registry=registry,
        )
        self._moved = (moved.labels("up"), moved.labels("down"))
        self._steps = {
            step: Histogram(f"crossnet_{role}_{step}_seconds", text, buckets=BUCKETS, registry=registry)
            for step, text in STEPS.items()
        }
        # Names of networks come from records and never from peers, so there are as many as the mesh has.
        self._by_network = Counter(
            f"crossnet_{role}_network_streams",
            "Streams that ended, by the network at the other end and whether they ended well.",
            ["network", "outcome"],
            registry=registry,
        )
        self._network_bytes = Counter(
            f"crossnet_{role}_network_bytes",
            "Payload bytes of ended streams, by the network at the other end.",
            ["network", "direction"],
            registry=registry,
        )
        self._networks: set[str] = set()
        self._over: deque[dict[str, object]] = deque(maxlen=MAX_ENDED)
        # Not "_streams": the counter above already takes that name without its "_total" suffix.
        live = Gauge(f"crossnet_{role}_streams_live", "Streams open now.", registry=registry)
        live.set_function(lambda: len(self._live))

    def __len__(self) -> int:
        return len(self._live)

    def open(self, stream: bytes, **fields: object) -> StreamRecord:
        """Begin a record with these log fields."""
        record = StreamRecord(stream=stream, fields=fields, _clock=self._clock, _started=self._clock())
        self._live.add(record)
        return record

    def close(self, record: StreamRecord, reason: Reason) -> None:
        """End a record: count the stream and write its log line."""
        self._live.discard(record)
        if record.is_evicted:
            reason = Reason.EVICTED
        self._ended[reason].inc()
        for counter, moved in zip(self._moved, record.moved, strict=True):
            counter.inc(moved)
        for step, seconds in record.seconds().items():
            self._steps[step].observe(seconds)
        network = record.fields.get("from_network") or record.fields.get("network")
        if network is not None:
            self._count_network(str(network), reason, record.moved)
        row = {**record.row(), "reason": reason.value}
        if record.detail:
            row["detail"] = record.detail
        if reason is not Reason.PROBE:  # which come every second, and would leave no room for streams
            self._over.append(row)
        self._log.info("stream", extra={"event": row})

    def drop(self, record: StreamRecord) -> None:
        """Discard a record that turned out to be part of another stream."""
        self._live.discard(record)

    def _count_network(self, network: str, reason: Reason, moved: tuple[int, int]) -> None:
        if network not in self._networks:
            if len(self._networks) >= MAX_NETWORKS:
                network = "_other"
            self._networks.add(network)
        self._by_network.labels(network, "ok" if reason is Reason.OK else "failed").inc()
        for direction, size in zip(("up", "down"), moved, strict=True):
            self._network_bytes.labels(network, direction).inc(size)

    def find(self, stream: bytes) -> StreamRecord | None:
        """Return the record of an open stream by its id, None if there is none."""
        return next((record for record in self._live if record.stream == stream), None)

    def ended(self) -> list[dict[str, object]]:
        """Return the rows of the streams that ended last, the latest at the end."""
        return list(self._over)

    def rows(self) -> list[dict[str, object]]:
        """Return the rows of the open streams, the oldest first."""
        live = sorted(self._live, key=lambda record: record._started)
        return [{**record.row(), "state": record.state} for record in live]
