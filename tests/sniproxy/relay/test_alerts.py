"""Alerts arrive, and clients that linger over theirs cost others nothing."""

import pytest

from sniproxy.engine import SocketStream
from sniproxy.formats.client_hello import HelloReason
from sniproxy.relay.alerts import ALERTS, SILENT
from sniproxy.streams.end_reason import Reason
from tests.support.hellos import (
    client_hello,
)
from tests.support.relays import ALERT, a_relay, name_of
from tests.support.streams import read_all
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio


async def count(stream: SocketStream) -> None:
    """A service that reads to the end and sends everything back."""
    await stream.send(await read_all(stream))
    stream.shutdown_write()


@pytest.mark.parametrize("size", [0, 60_000, 1 << 20, 8 << 20])
async def test_a_client_that_sends_on_still_gets_its_alert(size: int) -> None:
    """With more data behind a refused hello than is ever read: the reset at the end must not destroy the alert."""
    async with a_relay() as running:
        client = await running.dial("stranger.example")
        try:
            await client.send(bytes(size))
        except OSError:
            pass
        assert await client.recv() == ALERT["unrecognized_name"]
        client.close()


async def test_clients_that_linger_over_their_alert_keep_nobody_out() -> None:
    async with a_relay(max_streams=1) as running:
        port = await running.serve(count)
        lingering = [await running.dial("stranger.example") for _ in range(20)]
        await running.ended(20)
        client = await running.dial(name_of(port))
        client.shutdown_write()
        assert await read_all(client) == client_hello(name_of(port))
        for stream in [*lingering, client]:
            stream.close()


async def test_a_flood_of_refused_clients_is_not_waited_for() -> None:
    async with a_relay(max_lingering=3) as running:
        clients = [await running.dial("stranger.example") for _ in range(10)]
        for client in clients:
            assert await client.recv() == ALERT["unrecognized_name"]
        assert running.relay._alerts.lingering == 3
        for client in clients:
            client.close()
        await eventually(lambda: not running.relay._alerts.lingering)


def test_reasons_and_alerts_are_complete() -> None:
    assert {reason.value for reason in HelloReason} <= {reason.value for reason in Reason}
    assert not set(ALERTS) & SILENT
