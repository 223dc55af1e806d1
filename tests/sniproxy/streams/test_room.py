"""A full relay ends the longest idle stream of the client that holds most, and only for a client that may be carried."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Network
from typing import Any

import pytest

from sniproxy.engine import SocketStream
from sniproxy.streams import room
from tests.support.hellos import client_hello
from tests.support.relays import ALERT, Running, a_relay, name_of
from tests.support.streams import read_all, until_reset
from tests.support.waiting import eventually, later

pytestmark = pytest.mark.anyio


async def echo(stream: SocketStream) -> None:
    """A service that sends everything back."""
    with suppress(OSError):
        while data := await stream.recv():
            await stream.send(data)


class Clients:
    """Clients of one relay, each from an address of its own choice, which a PROXY header tells."""

    def __init__(self, running: Running, port: int) -> None:
        self.running, self.hello = running, client_hello(name_of(port))

    async def connect(self, address: str) -> SocketStream:
        """Connect and send the header alone."""
        client = await self.running.connect()
        await client.send(f"PROXY TCP4 {address} 10.9.9.9 1 443\r\n".encode())
        return client

    async def open(self, address: str) -> SocketStream:
        """Open a stream and wait until it has moved bytes both ways."""
        client = await self.connect(address)
        await client.send(self.hello)
        assert await client.recv_exactly(len(self.hello)) == self.hello
        await later()  # so that no two streams have moved at the same time
        return client

    def addresses(self) -> list[str]:
        """Return the clients of the open streams."""
        return sorted(str(row["client"]) for row in self.running.relay.ledger.rows())


@asynccontextmanager
async def a_full_relay(
    *addresses: str, min_idle_s: float = 0, **options: Any
) -> AsyncIterator[tuple[Clients, list[SocketStream]]]:
    """Run a relay that has streams of these clients and takes no more. Yields its clients, and their ends of the streams."""
    config: dict[str, Any] = {"max_streams": len(addresses), "proxy_from": (IPv4Network("127.0.0.0/8"),)} | options
    async with a_relay(min_idle_s=min_idle_s, **config) as running:
        clients = Clients(running, await running.serve(echo))
        streams = [await clients.open(address) for address in addresses]
        yield clients, streams
        for stream in streams:
            stream.close()


A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


async def test_the_longest_idle_stream_of_the_client_that_holds_most() -> None:
    async with a_full_relay(A, B, B, B) as (clients, streams):
        await streams[1].send(b"still in use")
        assert await streams[1].recv() == b"still in use"
        streams.append(await clients.open(C))
        await until_reset(streams[2])
        (line,) = await clients.running.ended()
        assert (line["reason"], line["client"]) == ("evicted", B)
        assert clients.running.counted("evicted") == 1
        assert clients.addresses() == [A, B, B, C]
        await streams[1].send(b"and still")
        assert await streams[1].recv() == b"and still"


async def test_many_at_once_get_one_place_each() -> None:
    async with a_full_relay(*[A] * 8) as (clients, streams):
        streams += await asyncio.gather(*(clients.open(f"10.0.1.{number}") for number in range(4)))  # noqa: TID251
        lines = await clients.running.ended(4)
        assert [(line["reason"], line["client"]) for line in lines] == [("evicted", A)] * 4
        assert len(clients.running.relay.ledger) == 8
        assert clients.running.relay._room.taken == 8


async def test_a_client_that_opens_more_and_more_takes_only_its_own() -> None:
    async with a_full_relay(A, A, B, B) as (clients, streams):
        streams += [await clients.open(C) for _ in range(10)]
        await eventually(lambda: len(clients.running.relay.ledger) == 4)
        held = clients.addresses()
        assert held.count(C) == 1, "with a second one it would hold as many as those it takes from"
        assert {A, B} <= set(held)


@pytest.mark.parametrize(
    "options", [{"idle_timeout_s": 3600}, {"min_idle_s": 3600}], ids=["silence has a limit", "all are in use"]
)
async def test_otherwise_the_new_stream_is_refused(options: dict[str, Any]) -> None:
    async with a_full_relay(A, A, **options) as (clients, streams):
        late = await clients.connect(B)
        assert await read_all(late) == ALERT["internal_error"]
        late.close()
        (line,) = await clients.running.ended()
        assert line["reason"] == "overloaded"
        assert "relay.max_streams" in str(line["detail"])
        assert all(not stream.closed for stream in streams)


async def test_nothing_is_ended_for_a_probe_or_for_a_stranger() -> None:
    async with a_full_relay(A, A) as (clients, streams):
        probe = await clients.connect(B)
        probe.close()
        stranger = await clients.connect(B)
        await stranger.send(client_hello("stranger.example"))
        assert await read_all(stranger) == ALERT["unrecognized_name"]
        stranger.close()
        lines = await clients.running.ended(2)
        assert [line["reason"] for line in lines] == ["probe", "unknown_name"]
        await clients.running.settled(2)
        for stream in streams:
            await stream.send(b"x")
            assert await stream.recv() == b"x"


async def test_silent_clients_of_a_full_relay_keep_only_themselves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_WAITING_EACH", 2)
    async with a_full_relay(A, A, A, A) as (clients, streams):
        streams += [await clients.connect(B) for _ in range(3)]
        assert await read_all(streams[-1]) == ALERT["internal_error"]
        assert (await clients.running.ended())[0]["client"] == B
        streams.append(await clients.open(C))
        assert (await clients.running.ended(2))[1]["client"] == A
