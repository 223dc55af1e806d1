"""UDP sockets: where replies come from, and what a flood of packets does."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial

import dns.message
import pytest

from dnsgw import DnsServer, Outcome
from tests.support import dns_servers
from tests.support.dns_meshes import DOMAIN, mesh, relay
from tests.support.dns_packets import opt, query
from tests.support.dns_servers import Client, address

pytestmark = pytest.mark.anyio

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
VIEW = mesh(relay("10.0.0.9"))


Running = Callable[..., AbstractAsyncContextManager[DnsServer]]


@pytest.fixture(params=["in batches", "one by one"])
def batches(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "in batches")


@pytest.fixture
def running(batches: bool) -> Running:
    return partial(dns_servers.running, udp_batches=batches)


def addresses(reply: bytes) -> list[str]:
    return [str(item) for rrset in dns.message.from_wire(reply).answer for item in rrset]


@pytest.mark.parametrize("listen", ["127.0.0.1", "::1"])
async def test_one_address(running: Running, listen: str) -> None:
    async with running(VIEW, listen=(listen,)) as server:
        with Client(address(server)) as client:
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]


@pytest.mark.parametrize("asked", ["127.0.0.1", "127.0.0.5", "127.8.9.10"])
async def test_a_wildcard_answers_from_the_address_that_was_asked(running: Running, asked: str) -> None:
    """The client's socket is connected: it takes replies from that address only, as libc does."""
    async with running(VIEW, listen=("0.0.0.0",)) as server:
        with Client((asked, address(server)[1])) as client:
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]
            assert addresses(await client.ask(query(ADDRESS, edns=opt()))) == ["10.0.0.9"]


async def test_both_wildcards_side_by_side(running: Running) -> None:
    async with running(VIEW, listen=("0.0.0.0", "::")) as server:
        with Client(("127.0.0.1", address(server, 0)[1])) as v4, Client(("::1", address(server, 1)[1])) as v6:
            assert addresses(await v4.ask(query(ADDRESS))) == ["10.0.0.9"]
            assert addresses(await v6.ask(query(ADDRESS))) == ["10.0.0.9"]


async def test_a_late_reply_comes_from_the_address_that_was_asked_too(running: Running) -> None:
    async with running(None, listen=("0.0.0.0",)) as server:
        with Client(("127.0.0.5", address(server)[1])) as client:
            client.send(query(ADDRESS))
            client.send(b"")
            assert (await client.ask(query("www.example.test")))[3] & 15 == 2
            server.apply(VIEW)
            assert addresses(await client.receive()) == ["10.0.0.9"]


async def test_many_packets_at_once_are_all_answered(running: Running) -> None:
    async with running(VIEW) as server:
        with Client(address(server)) as client:
            for n in range(200):  # more than one drain, fewer than the socket's buffer holds
                client.send(query(f"p8443-10-1-0-{n}.b.{DOMAIN}", ident=n))
            seen = {int.from_bytes((await client.receive())[:2], "big") for _ in range(200)}
        assert seen == set(range(200))


async def test_packets_that_get_no_reply_do_no_harm(running: Running) -> None:
    async with running(VIEW) as server:
        with Client(address(server)) as client:
            for packet in (b"", b"x", query(ADDRESS, flags=0x8180), b"\0" * 11, b"\xff" * 4000):
                client.send(packet)
            client.send(b"\0" * 60000)  # cut by the kernel, and refused
            assert (await client.receive())[2:4] == b"\x80\x81"
            assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]
        assert server.metrics.queries[Outcome.IGNORED] == 5
        assert server.metrics.queries[Outcome.MALFORMED] == 1


async def test_several_servers_share_a_port(running: Running, batches: bool) -> None:
    async with running(VIEW, reuse_port=True) as one:
        config = replace(one.config, listen=(one.addresses[0],))
        two = DnsServer(config, udp_batches=batches)
        await two.open()
        two.apply(VIEW)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(two.run())
            for _ in range(40):
                with Client(address(one)) as client:  # the kernel goes by the source
                    assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]
            counts = [server.metrics.queries[Outcome.ANSWERED] for server in (one, two)]
            assert sum(counts) == 40
            assert min(counts) > 0
            await two.close()
