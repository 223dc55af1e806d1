"""The whole server on loopback: its life cycle, and dig as a third-party client."""

import asyncio
import logging
import socket
import subprocess
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import dns.message
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from discovery.model.names import BadName
from dnsgw import DnsConfig, DnsServer, UpstreamLoop
from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_meshes import DOMAIN, ORDERS, imports, mesh, relay
from tests.support.dns_packets import opt, query
from tests.support.dns_servers import Client, address, connected, free_port, running
from tests.support.waiting import logged

pytestmark = pytest.mark.anyio

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
VIEW = mesh(relay("10.0.0.9"))
LOOPBACK = ip_address("127.0.0.1")


def addresses(reply: bytes) -> list[str]:
    return [str(item) for rrset in dns.message.from_wire(reply).answer for item in rrset]


# Life cycle.


async def test_udp_and_tcp_have_the_same_port_on_every_address() -> None:
    async with running(VIEW, listen=("127.0.0.1", "127.0.0.2", "::1")) as server:
        assert [str(host) for host, _ in server.addresses] == ["127.0.0.1", "127.0.0.2", "::1"]
        for index in range(3):
            with Client(address(server, index)) as client:
                assert addresses(await client.ask(query(ADDRESS))) == ["10.0.0.9"]
        async with connected(server) as connection:
            assert addresses(await connection.ask(query(ADDRESS))) == ["10.0.0.9"]


async def test_questions_between_open_and_run_are_answered_then() -> None:
    server = DnsServer(DnsConfig(network="a", listen=((LOOPBACK, 0),), resolv_conf=Path("/nonexistent")))
    await server.open()
    server.apply(VIEW)
    with Client(address(server)) as client:
        client.send(query(ADDRESS))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.run())
            assert addresses(await client.receive()) == ["10.0.0.9"]
            await server.close()


async def test_it_can_be_cancelled_closed_and_started_again_on_its_port() -> None:
    port = 0
    for _ in range(3):
        server = DnsServer(DnsConfig(network="a", listen=((LOOPBACK, port),), resolv_conf=Path("/nonexistent")))
        await server.open()
        port = server.addresses[0][1]
        async with asyncio.TaskGroup() as tasks:
            running_task = tasks.create_task(server.run())
            async with connected(server) as connection:
                connection.send(query("localhost"))
                assert addresses(await connection.receive()) == ["127.0.0.1"]
            running_task.cancel()
        await server.close()
        await server.close()


async def test_an_address_that_is_taken_leaves_nothing_open() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        server = DnsServer(DnsConfig(network="a", listen=((ip_address("127.0.0.2"), 0), (LOOPBACK, port))))
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await server.open()
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_waiting_questions_are_answered_at_the_end() -> None:
    async with serving() as upstream:
        upstream.script = lambda asked: []
        async with running(None, upstream.port) as server, connected(server) as connection:
            with Client(address(server)) as client:
                connection.send(query("www.example.test", ident=1), query(ADDRESS, ident=2))
                client.send(query("www.example.test", ident=3))
                client.send(query(ADDRESS, ident=4))
                await upstream.heard(2)
                await server.close()
                replies = [await client.receive() for _ in range(2)] + [await connection.receive() for _ in range(2)]
                assert sorted(reply[:2] for reply in replies) == [b"\0\1", b"\0\2", b"\0\3", b"\0\4"]
                assert {reply[3] & 15 for reply in replies} == {2}
                assert await connection.ended() == b""


async def test_a_bad_domain_is_reported_before_anything_is_opened() -> None:
    with pytest.raises(BadName):
        DnsServer(DnsConfig(network="a", listen=(), domain="mesh..internal"))


# Upstreams.


async def test_an_upstream_that_is_this_server_is_refused() -> None:
    port = free_port()
    for listen, upstream in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.53")):
        server = DnsServer(
            DnsConfig(network="a", listen=((ip_address(listen), port),), upstream=((ip_address(upstream), port),))
        )
        with pytest.raises(UpstreamLoop, match=f"{upstream}:{port} is this server itself"):
            await server.open()
        assert server.addresses[0][1] == port
        with socket.create_server((listen, port)):
            pass  # nothing was left open


async def test_the_hosts_own_resolvers_but_for_ourselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\nnameserver 192.0.2.1\n")
    port = free_port()
    async with running(VIEW, listen=("127.0.0.1",), resolv_conf=conf, resolv_conf_port=port) as server:
        assert [up.endpoint for up in server.upstreams] == [(LOOPBACK, port), (ip_address("192.0.2.1"), port)]
    server = DnsServer(DnsConfig(network="a", listen=((LOOPBACK, port),), resolv_conf=conf), resolv_conf_port=port)
    await server.open()
    assert [up.endpoint for up in server.upstreams] == [(ip_address("192.0.2.1"), port)]
    await server.close()
    conf.write_text("nameserver 127.0.0.1\n")
    with caplog.at_level(logging.WARNING):
        await server.open()
    assert server.upstreams == ()
    assert "dns_no_upstream" in caplog.text
    await server.close()


@pytest.mark.parametrize("others", [0, 1])
async def test_an_upstream_that_asks_us_is_noticed_and_left_out(upstream: Authority, others: int) -> None:
    """The first upstream forwards every question to us, which would be an endless loop."""
    async with serving() as circle:
        ports = (circle.port, upstream.port)[: 1 + others]
        with logged("dnsgw", "dns_loop") as noticed, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            async with running(VIEW, *ports, loop_probe=True) as server:
                asker.connect(address(server))

                def ask_us(asked: Asked) -> list[bytes]:
                    asker.send(asked.packet)
                    return []

                circle.script = ask_us
                async with asyncio.timeout(10):
                    await noticed.wait()
                before = len(circle.asked)
                with Client(address(server)) as client:
                    reply = dns.message.from_wire(await client.ask(query("www.example.test", edns=opt())))
                    assert bool(reply.answer) == bool(others)
                    if not others:
                        assert reply.rcode() == 2
                        assert "loop" in str(reply.options[0])
                assert len(circle.asked) == before


# Metrics.


async def test_it_counts_on_the_registry_that_it_is_given() -> None:
    registry = CollectorRegistry()
    server = DnsServer(
        DnsConfig(network="a", listen=((LOOPBACK, 0),), resolv_conf=Path("/nonexistent")), registry=registry
    )
    await server.open()
    server.apply(VIEW)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.run())
        with Client(address(server)) as client:
            for name, qtype in ((ADDRESS, 1), (ADDRESS, 1), (ADDRESS, 28), (f"x.nope.{DOMAIN}", 1), ("x.test", 1)):
                await client.ask(query(name, qtype))
            await client.ask(query(ADDRESS) + b"x")
        async with connected(server) as connection:
            await connection.ask(query(ADDRESS, 252))
            text = generate_latest(registry).decode()
        await server.close()
    for line in (
        'queries_total{outcome="answered"} 2.0',
        'queries_total{outcome="nodata"} 1.0',
        'queries_total{outcome="nxdomain"} 1.0',
        'queries_total{outcome="upstream_failed"} 1.0',
        'queries_total{outcome="malformed"} 1.0',
        'queries_total{outcome="refused"} 1.0',
        "tcp_connections 1.0",
        "in_flight 0.0",
    ):
        assert f"crossnet_dns_{line}" in text


# dig.


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    records = {
        ("www.example.test", "A"): ["192.0.2.1"],
        ("big.example.test", "TXT"): [f"{n}-{'x' * 200}" for n in range(12)],
        ("www.example.test", "HTTPS"): ["1 . alpn=h3"],
    }
    async with serving(records) as authority:
        yield authority


NODATA = ["status: NOERROR", "ANSWER: 0, AUTHORITY: 1", "SOA"]
DIG = {
    "A": (ADDRESS, ["status: NOERROR", "flags: qr aa rd ra;", "IN A 10.0.0.9", "EDNS: version: 0, flags:; udp: 1232"]),
    "case": (ADDRESS.upper(), ["status: NOERROR", f"{ADDRESS.upper()}. 5 IN A 10.0.0.9"]),
    "over TCP": (f"+tcp {ADDRESS}", ["status: NOERROR", "IN A 10.0.0.9", "(TCP)"]),
    "two over one connection": (f"+tcp +keepopen {ADDRESS} HTTPS {ADDRESS}", ["status: NOERROR", "IN A 10.0.0.9"]),
    "AAAA": (f"{ADDRESS} AAAA", NODATA),
    "HTTPS": (f"{ADDRESS} HTTPS", NODATA),
    "SVCB": (f"{ADDRESS} SVCB", NODATA),
    "unknown type": (f"{ADDRESS} TYPE65280", NODATA),
    "ANY": (f"{ADDRESS} ANY +notcp", ['HINFO "RFC8482" ""']),
    "ANY over TCP": (f"{ADDRESS} ANY +tcp", ['HINFO "RFC8482" ""', "(TCP)"]),
    "SRV": (f"_8443.orders.shop._b.{DOMAIN} SRV", [f"SRV 0 0 443 p8443-orders.shop.b.{DOMAIN}."]),
    "imported": (ORDERS, ["status: NOERROR", "IN A 10.0.0.9"]),
    "unknown network": (f"p1-10-1-0-5.x.{DOMAIN}", ["status: NXDOMAIN", "SOA", "0 (Other)", "unknown_network"]),
    "no EDNS": (f"+noedns {ADDRESS}", ["IN A 10.0.0.9", "ADDITIONAL: 0", "!EDNS"]),
    "EDNS 1": (f"+edns=1 +noednsnegotiation {ADDRESS}", ["status: BADVERS", "EDNS: version: 0", "ANSWER: 0"]),
    "EDNS 1, then 0": (f"+edns=1 +ednsnegotiation {ADDRESS}", ["status: NOERROR", "IN A 10.0.0.9"]),
    "DO": (f"+dnssec {ADDRESS}", ["flags: do; udp: 1232", "IN A 10.0.0.9"]),
    "unknown option": (f"+ednsopt=65001:abcd +nocookie {ADDRESS}", ["status: NOERROR", "IN A 10.0.0.9", "!OPT=65001"]),
    "cookie": (f"+cookie {ADDRESS}", ["status: NOERROR", "IN A 10.0.0.9"]),
    "unknown flag of EDNS": (f"+ednsflags=0x40 {ADDRESS}", ["status: NOERROR", "EDNS: version: 0, flags:; udp"]),
    "small buffer": (f"+bufsize=128 {ADDRESS}", ["status: NOERROR", "IN A 10.0.0.9"]),
    "no RD, CD": (f"+norecurse +cdflag {ADDRESS}", ["flags: qr aa ra cd;", "IN A 10.0.0.9"]),
    "AD": (f"+adflag {ADDRESS}", ["flags: qr aa rd ra;"]),
    "NOTIFY": (f"+opcode=notify {ADDRESS}", ["opcode: NOTIFY, status: NOTIMP", "QUESTION SECTION"]),
    "UPDATE": (f"+opcode=update {ADDRESS}", ["opcode: UPDATE, status: NOTIMP"]),
    "CH": ("version.bind TXT CH", ["status: REFUSED"]),
    "AXFR": (f"{DOMAIN} AXFR", ["Transfer failed"]),
    "foreign": ("www.example.test", ["status: NOERROR", "www.example.test. 300 IN A 192.0.2.1"]),
    "foreign HTTPS": ("www.example.test HTTPS", ['1 . alpn="h3"']),
    "foreign over TCP": ("+tcp www.example.test", ["www.example.test. 300 IN A 192.0.2.1", "(TCP)"]),
    "foreign and too big": ("big.example.test TXT", ["Truncated, retrying in TCP mode", "ANSWER: 12", "(TCP)"]),
    "foreign, too big, no TCP": ("+ignore big.example.test TXT", ["flags: qr tc rd ra", "QUESTION SECTION", "EDNS"]),
    "foreign and missing": ("nope.example.test", ["status: NXDOMAIN", "SOA"]),
    "localhost": ("localhost AAAA", ["IN AAAA ::1"]),
    "empty question": ("+header-only", ["status: FORMERR", "QUERY: 0"]),
}


@pytest.mark.needs("dig")
@pytest.mark.interop
async def test_dig(upstream: Authority) -> None:
    """All of it against one server, each question a dig of its own; what begins with ! must not be there."""
    async with running(VIEW, upstream.port, imports=imports()) as server:
        host, port = address(server)

        async def dig(arguments: str) -> str:
            process = await asyncio.create_subprocess_exec(
                *("dig", f"@{host}", "-p", str(port), "+tries=1", "+timeout=3", "+noidnin", *arguments.split()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            text = " ".join(output.decode().split())
            return text[text.rfind("Got answer") :] if "Got answer" in text and "Truncated" not in text else text

        failures = []
        for name, (arguments, wanted) in DIG.items():
            text = await dig(arguments)
            wrong = [want for want in wanted if (want.removeprefix("!") in text) == want.startswith("!")]
            if wrong:
                failures.append(f"{name}: {wrong} in\n{text}\n")
        assert not failures, "\n".join(failures)
