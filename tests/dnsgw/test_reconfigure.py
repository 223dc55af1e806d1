"""A new configuration for a running server: its answers from then on, and to outstanding questions."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import dns.message
import pytest

from discovery.model.mesh import VipSpec
from dnsgw import DnsServer, UpstreamLoop
from dnsgw.server import ServerTiming
from dnsgw.upstream.address import UpstreamAddress, UpstreamProtocol
from dnsgw.upstream.cache import CacheConfig
from tests.support.dns_authority import Authority, serving
from tests.support.dns_meshes import DOMAIN, ORDERS, imports, mesh, relay
from tests.support.dns_packets import opt, option, query
from tests.support.dns_servers import Client, address, connected, running
from tests.support.waiting import eventually, logged

pytestmark = pytest.mark.anyio

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
WWW = "www.example.test"
LOOPBACK = ip_address("127.0.0.1")
VIEW = mesh(relay("10.0.0.9"))


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving({(WWW, "A"): ["192.0.2.1"]}) as authority:
        yield authority


@pytest.fixture
async def other() -> AsyncIterator[Authority]:
    async with serving({(WWW, "A"): ["192.0.2.2"]}) as authority:
        yield authority


def change(server: DnsServer, **changes: Any) -> None:
    server.reconfigure(replace(server.config, **changes))


def addresses(reply: bytes) -> list[str]:
    return [str(item) for rrset in dns.message.from_wire(reply).answer for item in rrset]


async def asked(server: DnsServer, packet: bytes, source: str | None = None) -> dns.message.Message:
    with Client(address(server), source) as client:
        return dns.message.from_wire(await client.ask(packet))


async def test_answers_of_a_former_upstream_are_passed_on_and_not_cached(upstream: Authority, other: Authority) -> None:
    late: list[tuple[bytes, tuple[str, int]]] = []
    upstream.script = lambda question: late.append((question.answer, question.source)) or []  # type: ignore[func-returns-value]
    async with running(VIEW, upstream.port, timing=ServerTiming(retired_s=0.05)) as server:
        with Client(address(server)) as client:
            client.send(query(WWW))
            await upstream.heard(1)
            change(server, upstream=((LOOPBACK, other.port),))
            assert [str(each) for each in server.upstreams] == [f"127.0.0.1:{other.port}"]
            assert server.metrics.in_flight() == 1
            upstream.send(*late[0])
            assert addresses(await client.receive()) == ["192.0.2.1"]
            for _ in range(3):
                assert addresses(await client.ask(query(WWW))) == ["192.0.2.2"]
        assert (len(upstream.asked), len(other.asked)) == (1, 1)
        await eventually(lambda: len(server._forwarders) == 1)


async def test_it_ends_with_former_upstreams_still_asked(upstream: Authority, other: Authority) -> None:
    upstream.script = lambda question: []
    async with running(VIEW, upstream.port, loop_probe=True) as server, connected(server) as connection:
        connection.send(query(WWW))
        await upstream.heard(2)  # the probe is one
        for port in (other.port, upstream.port, other.port):
            change(server, upstream=((LOOPBACK, port),))
        await server.close()
        assert (await connection.receive())[3] & 15 == 2
        change(server, ttl_s=9)  # too late, and no harm


async def test_an_upstream_that_cannot_be_changes_nothing(upstream: Authority) -> None:
    secret = UpstreamAddress(LOOPBACK, 853, UpstreamProtocol.TLS)
    async with running(VIEW, upstream.port) as server:
        before = server.config
        with pytest.raises(UpstreamLoop):
            change(server, upstream=(server.addresses[0],), ttl_s=9)
        with pytest.raises(OSError, match="certificate"):
            change(server, upstream=(secret,), upstream_ca="none", ttl_s=9)
        assert server.config is before
        with Client(address(server)) as client:
            assert addresses(await client.ask(query(WWW))) == ["192.0.2.1"]
            assert dns.message.from_wire(await client.ask(query(ADDRESS))).answer[0].ttl == 5


async def test_the_cache_survives_unrelated_changes(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for change_ in ({}, {"ttl_s": 9}, {"race_s": 0.1}, {"cache": CacheConfig(max_ttl_s=900)}):
                change(server, **change_)
                assert addresses(await client.ask(query(WWW))) == ["192.0.2.1"]
            assert len(upstream.asked) == 1
            for cache in (CacheConfig(max_ttl_s=299), CacheConfig(max_bytes=0), CacheConfig(max_bytes=0)):
                change(server, cache=cache)
                assert server.metrics.cache_entries() == 0
                assert addresses(await client.ask(query(WWW))) == ["192.0.2.1"]
            assert len(upstream.asked) == 4


async def test_a_forwarded_zone_takes_effect_at_once(upstream: Authority, other: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for _ in range(2):
                assert addresses(await client.ask(query(WWW))) == ["192.0.2.1"]
            change(server, forward={"example.test": (UpstreamAddress(LOOPBACK, other.port),)})
            assert addresses(await client.ask(query(WWW))) == ["192.0.2.2"]
            change(server, forward={})
            assert addresses(await client.ask(query(WWW))) == ["192.0.2.1"]


async def test_absent_names_change_at_once(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server:
        with Client(address(server)) as client:
            for _ in range(3):
                assert addresses(await client.ask(query(WWW))) == ["192.0.2.1"]
            change(server, absent=("example.test",))
            assert dns.message.from_wire(await client.ask(query(WWW))).rcode() == dns.rcode.NXDOMAIN
            change(server, forward={"www.example.test": (UpstreamAddress(LOOPBACK, upstream.port),)})
            assert addresses(await client.ask(query(WWW))) == ["192.0.2.1"]


async def test_access_list_and_rate_limit(upstream: Authority) -> None:
    async with running(VIEW, upstream.port) as server, connected(server) as connection:
        assert addresses(await connection.ask(query(ADDRESS))) == ["10.0.0.9"]
        change(server, allow=(ip_network("127.0.0.2/32"),))
        assert (await connection.ask(query(ADDRESS)))[3] & 15 == 5
        assert (await asked(server, query(ADDRESS))).rcode() == 5
        assert (await asked(server, query(ADDRESS), "127.0.0.2")).answer
        change(server, rate_limit=1, allow=(ip_network("127.0.0.0/8"),))
        with Client(address(server)) as client:
            for _ in range(10):
                client.send(query(ADDRESS))
            assert not (await client.receive())[2] & 2
            assert (await client.receive())[2] & 2  # TC: it is too much now


async def test_answers_of_ours() -> None:
    claimed: list[tuple[str, VipSpec]] = []
    async with running(mesh(), claim=lambda *record: claimed.append(record)) as server:
        assert (await asked(server, query(ADDRESS))).rcode() == 2
        server.apply(VIEW)
        change(server, imports=imports(), ttl_s=7)
        assert [rrset.ttl for rrset in (await asked(server, query(ORDERS))).answer] == [7]
        change(server, vip=ip_network("240.0.0.0/16"))
        assert ORDERS in {record.name for _, record in claimed}
        server.apply(mesh())
        assert (await asked(server, query(ADDRESS))).rcode() == 2
        change(
            server, stale_relays_for_s=60.0
        )  # the time counts from the loss of the last relay, not from the change of the configuration
        assert (await asked(server, query(ADDRESS))).answer
        change(server, stale_relays_for_s=0.0)
        assert (await asked(server, query(ADDRESS))).rcode() == 2


async def test_the_secret_of_cookies() -> None:
    async def cookie(server: DnsServer) -> bytes:
        packet = query(ADDRESS, edns=opt(options=option(10, b"12345678")))
        made: bytes = (await asked(server, packet)).options[0].to_wire()[8:12] + (await asked(server, packet)).options[
            0
        ].to_wire()[16:]
        return made

    async with running(VIEW) as server:
        drawn = await cookie(server)
        change(server, cookie_secret=bytes(16))
        assert await cookie(server) != drawn
        change(server, cookie_secret=None)
        assert (await cookie(server))[:4] == drawn[:4]


async def test_a_new_resolv_conf_is_noticed(
    upstream: Authority,
    other: Authority,
    tmp_path: Path,
) -> None:
    def write(text: str) -> None:
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", tmp_path / "resolv.conf")

    def upstreams(server: DnsServer) -> list[str]:
        server.check_resolv_conf()
        return [str(each.address) for each in server.upstreams]

    write("nameserver 127.0.0.1\nnameserver 192.0.2.1\n")
    async with running(VIEW, resolv_conf=tmp_path / "resolv.conf") as server:
        assert upstreams(server) == ["127.0.0.1", "192.0.2.1"]
        write("nameserver 192.0.2.2\n")
        assert upstreams(server) == ["192.0.2.2"]
        for text in ("", "# being written", "nameserver nonsense"):
            write(text)
            assert upstreams(server) == ["192.0.2.2"]
        (tmp_path / "resolv.conf").unlink()
        assert upstreams(server) == ["192.0.2.2"]
        write("nameserver 192.0.2.3\n")
        assert upstreams(server) == ["192.0.2.3"]
        change(server, upstream=((LOOPBACK, other.port),))
        write("nameserver 192.0.2.4\n")
        assert upstreams(server) == ["127.0.0.1"]
        assert addresses(await asked_bytes(server, query(WWW))) == ["192.0.2.2"]


async def test_resolv_conf_is_looked_at_again_and_again(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 192.0.2.1\n")
    timing = ServerTiming(resolv_conf_s=0.01)
    with logged("dnsgw", "dns_upstreams") as noticed:
        async with running(VIEW, resolv_conf=conf, timing=timing) as server:
            for host in ("192.0.2.22", "192.0.2.3"):
                conf.write_text(f"nameserver {host}\n")
                async with asyncio.timeout(5):
                    while [str(each) for each in server.upstreams] != [host]:
                        noticed.clear()
                        await noticed.wait()


async def asked_bytes(server: DnsServer, packet: bytes) -> bytes:
    with Client(address(server)) as client:
        return await client.ask(packet)
