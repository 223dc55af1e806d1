"""Stream records: one log line and one sample for each stream, times and bytes, and no label that a peer can choose."""

import logging

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from crossnet.logs import JsonFormatter, LogfmtFormatter
from sniproxy.engine import CopyDirection, IdleTimer
from sniproxy.streams.end_reason import RETRYABLE, Reason
from sniproxy.streams.stream_log import StreamLog
from tests.support.streams import pair

pytestmark = pytest.mark.anyio

STREAM = bytes(range(16))


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def ledger(registry: CollectorRegistry) -> StreamLog:
    made = StreamLog("relay", registry)
    made._clock = Clock()
    return made


def tick(ledger: StreamLog, seconds: float) -> None:
    assert isinstance(ledger._clock, Clock)
    ledger._clock.now += seconds


async def moved(count: int) -> CopyDirection:
    one, other = await pair()
    direction = CopyDirection(IdleTimer(60.0), one, other)
    one.close()
    other.close()
    direction.moved = count
    return direction


async def test_one_line_at_the_end(ledger: StreamLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "crossnet.relay")
    account = ledger.open(STREAM, client="10.0.0.77", local="10.0.0.9:443")
    tick(ledger, 0.0123)
    account.mark("hello")
    account.fields["sni"] = "orders.shop.example"
    tick(ledger, 0.1)
    account.mark("route")
    down = await moved(2000)
    down.first_at = 1000.5
    account.carry(up=await moved(100), down=down)
    tick(ledger, 1)
    ledger.close(account, Reason.OK)
    (line,) = caplog.records
    assert line.getMessage() == "stream"
    assert line.event == {  # type: ignore[attr-defined]
        "stream": STREAM.hex(),
        "client": "10.0.0.77",
        "local": "10.0.0.9:443",
        "sni": "orders.shop.example",
        "bytes_up": 100,
        "bytes_down": 2000,
        "ms_hello": 12.3,
        "ms_route": 112.3,
        "ms_first_byte": 500.0,
        "ms_total": 1112.3,
        "reason": "ok",
    }


async def test_a_detail_only_where_there_is_one(ledger: StreamLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "crossnet.relay")
    account = ledger.open(STREAM)
    account.detail = "relay.allow does not have this client's address"
    ledger.close(account, Reason.DENIED)
    event = caplog.records[0].event  # type: ignore[attr-defined]
    assert (event["reason"], event["detail"]) == ("denied", "relay.allow does not have this client's address")
    assert (event["bytes_up"], event["bytes_down"]) == (0, 0)
    assert "ms_first_byte" not in event


async def test_every_reason_is_there_from_the_start(ledger: StreamLog, registry: CollectorRegistry) -> None:
    del ledger
    for reason in Reason:
        assert registry.get_sample_value("crossnet_relay_streams_total", {"reason": reason.value}) == 0
    for direction in ("up", "down"):
        assert registry.get_sample_value("crossnet_relay_bytes_total", {"direction": direction}) == 0
    assert registry.get_sample_value("crossnet_relay_streams_live") == 0


async def test_streams_are_counted_and_never_named(ledger: StreamLog, registry: CollectorRegistry) -> None:
    samples = len(generate_latest(registry).splitlines())
    for number in range(50):
        account = ledger.open(bytes([number] * 16), client=f"10.0.0.{number}", sni=f"n{number}.example")
        account.carry(up=await moved(10), down=await moved(number))
        if number % 2:
            ledger.close(account, Reason.OK if number % 4 == 1 else Reason.DENIED)
    assert len(ledger) == 25
    assert registry.get_sample_value("crossnet_relay_streams_live") == 25
    assert registry.get_sample_value("crossnet_relay_streams_total", {"reason": "ok"}) == 13
    assert registry.get_sample_value("crossnet_relay_streams_total", {"reason": "denied"}) == 12
    assert registry.get_sample_value("crossnet_relay_bytes_total", {"direction": "up"}) == 250
    assert registry.get_sample_value("crossnet_relay_bytes_total", {"direction": "down"}) == sum(range(1, 50, 2))
    text = generate_latest(registry)
    assert len(text.splitlines()) == samples, "what peers say makes no new time series"
    assert b"example" not in text
    assert b"10.0.0" not in text


async def test_rows_of_open_streams(ledger: StreamLog) -> None:
    first = ledger.open(STREAM, client="10.0.0.1")
    tick(ledger, 1)
    second = ledger.open(STREAM[::-1], client="10.0.0.2")
    second.state = "dialling"
    first.carry(up=await moved(1), down=await moved(2))
    rows = ledger.rows()
    assert [(row["client"], row["state"], row["ms_total"]) for row in rows] == [
        ("10.0.0.1", "open", 1000.0),
        ("10.0.0.2", "dialling", 0.0),
    ]
    assert (rows[0]["bytes_up"], rows[0]["bytes_down"]) == (1, 2)


async def test_a_dropped_record_leaves_no_trace(
    ledger: StreamLog, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "crossnet.relay")
    ledger.drop(ledger.open(STREAM))
    assert len(ledger) == 0
    assert not caplog.records
    assert registry.get_sample_value("crossnet_relay_streams_total", {"reason": "ok"}) == 0


@pytest.mark.parametrize(
    "name", ['x","reason":"ok', "x\nevent=stream reason=ok", "x\r\n\x1b[2K", "x reason=ok", "\u2028\x00\x7f", "é" * 300]
)
async def test_no_text_forges_a_line(ledger: StreamLog, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Whatever comes in a field, as JSON or logfmt: one line, one reason, at most 200 bytes of it."""
    caplog.set_level(logging.INFO, "crossnet.relay")
    account = ledger.open(STREAM, sni=name)
    account.detail = name
    ledger.close(account, Reason.DENIED)
    for formatter in (JsonFormatter(), LogfmtFormatter()):
        line = formatter.format(caplog.records[0])
        assert len(line.splitlines()) == 1
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 3200
    assert JsonFormatter().format(caplog.records[0]).count('"reason":') == 1
    assert LogfmtFormatter().format(caplog.records[0]).count(" reason=denied ") == 1


def test_what_may_be_tried_elsewhere() -> None:
    """Nothing has reached a service after any of these."""
    assert {"dial_failed", "overloaded", "draining", "no_endpoint", "no_view"} == RETRYABLE
