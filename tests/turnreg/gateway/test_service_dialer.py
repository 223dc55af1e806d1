"""Connecting to a service: which addresses may be dialled, rotation of endpoints, and the next one after a failure."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import pytest
from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import AnyRecord, GatewaySpec, Kind, RelaySpec, ServiceSpec, TurnSpec
from sniproxy.access.rules import Policy, Rule
from sniproxy.endpoints.dialer import EndpointDialer
from sniproxy.engine import Listener, SocketStream
from sniproxy.formats import proxy_protocol
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.preamble import Preamble
from tests.support.fixed_discovery import FixedDiscovery, record
from tests.support.preambles import name_for, preamble
from tests.support.webservers import WEBSERVERS, webserver
from turnreg.gateway.service_dialer import ServiceDialer, Undeliverable

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"
DOMAIN = "svc.mesh.internal"
LOOPBACK = TargetList.parse(["127.0.0.0/8", "[::1/128]"])


def service(*endpoints: str, name: str = NAME, proxy_protocol: bool | Literal["v1", "v2"] = False) -> AnyRecord:
    spec = ServiceSpec(name=name, ports={"8443": list(endpoints)}, proxy_protocol=proxy_protocol)
    return record(Kind.SERVICE, "b", name, spec)


def delivery(
    *records: AnyRecord,
    allow: TargetList = LOOPBACK,
    rules: Sequence[Rule] = (),
    guard: Sequence[tuple[str, int]] = (),
    dial_timeout_s: float = 5.0,
) -> ServiceDialer:
    policy = Policy(tuple(rules))
    return ServiceDialer(
        "b",
        DOMAIN,
        FixedDiscovery(*records),
        allow,
        policy,
        guard=guard,
        dial_timeout_s=dial_timeout_s,
        endpoints=EndpointDialer("gateway", CollectorRegistry()),
    )


@asynccontextmanager
async def services(count: int = 1, address: str = "127.0.0.1") -> AsyncIterator[list[str]]:
    """Run services that keep connections open; give their endpoints."""

    async def hold(stream: SocketStream) -> None:
        while await stream.recv():
            pass

    listeners = [await Listener.open(address, 0) for _ in range(count)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(listener.serve(hold)) for listener in listeners]
        try:
            yield [f"[{a}]:{p}" if ":" in a else f"{a}:{p}" for a, p in (listener.address for listener in listeners)]
        finally:
            for task, listener in zip(tasks, listeners, strict=True):
                listener.close()
                task.cancel()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def refused(delivering: ServiceDialer, target: str) -> Undeliverable:
    with pytest.raises(Undeliverable) as failed:
        await delivering.connect(asking(target))
    return failed.value


def asking(target: str, **changes: object) -> Preamble:
    """Make a preamble whose name leads to this target."""
    return preamble(target, authority=name_for(target), **changes)  # type: ignore[arg-type]


# --- what is reached ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_an_address(address: str) -> None:
    async with services(address=address) as (endpoint,):
        delivered = await delivery().connect(asking(endpoint))
        assert delivered.endpoint == endpoint
        assert delivered.ms >= 0
        delivered.stream.close()


async def test_a_services_endpoints_take_turns() -> None:
    async with services(3) as endpoints:
        delivering = delivery(service(*endpoints))
        taken = []
        for _ in range(6):
            delivered = await delivering.connect(preamble(f"{NAME}:8443"))
            taken.append(delivered.endpoint)
            delivered.stream.close()
    assert taken == endpoints * 2


async def test_the_next_endpoint_on_failure() -> None:
    async with services(1) as endpoints:
        dead = f"127.0.0.1:{closed_port()}"
        delivering = delivery(service(dead, *endpoints))
        for _ in range(4):
            delivered = await delivering.connect(preamble(f"{NAME}:8443"))
            assert delivered.endpoint == endpoints[0]
            delivered.stream.close()


async def test_every_living_endpoint_is_within_reach() -> None:
    async with services(1) as endpoints:
        dead = [f"127.0.0.1:{closed_port()}" for _ in range(40)]
        delivered = await delivery(service(*dead, *endpoints)).connect(preamble(f"{NAME}:8443"))
        assert delivered.endpoint == endpoints[0]
        delivered.stream.close()


async def test_a_dead_endpoint_is_dialled_once_and_left_out() -> None:
    async with services(2) as endpoints:
        delivering = delivery(service(f"127.0.0.1:{closed_port()}", *endpoints))
        taken = []
        for _ in range(8):
            delivered = await delivering.connect(preamble(f"{NAME}:8443"))
            taken.append(delivered.endpoint)
            delivered.stream.close()
        [failing] = delivering._endpoints.status()
    assert failing["failures"] == 1
    assert {taken.count(endpoint) for endpoint in endpoints} == {4}


async def test_endpoints_that_may_not_be_dialled_use_up_no_tries() -> None:
    async with services(1) as endpoints:
        denied = [f"192.0.2.{number}:8443" for number in range(1, 6)]
        delivered = await delivery(service(*denied, *endpoints)).connect(preamble(f"{NAME}:8443"))
        assert delivered.endpoint == endpoints[0]
        delivered.stream.close()


async def test_a_dead_endpoint_says_more_than_a_denied_one() -> None:
    """In any order of the endpoints. The reason decides whether the relay may try another gateway."""
    delivering = delivery(service(f"127.0.0.1:{closed_port()}", "192.0.2.1:8443"))
    for _ in range(2):
        assert (await refused(delivering, f"{NAME}:8443")).reason is Reason.DIAL_FAILED


@pytest.mark.parametrize("asked", [True, "v1", "v2"])
async def test_a_service_that_asks_for_it_gets_a_proxy_header(asked: bool | Literal["v1", "v2"]) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def read(stream: SocketStream) -> None:
        got.set_result(await stream.recv())

    listener = await Listener.open("127.0.0.1", 0)
    endpoint = f"127.0.0.1:{listener.address[1]}"
    async with asyncio.TaskGroup() as group:
        group.create_task(listener.serve(read))
        delivered = await delivery(service(endpoint, proxy_protocol=asked)).connect(preamble(f"{NAME}:8443"))
        header = await got
        delivered.stream.close()
        listener.close()
    parsed = proxy_protocol.parse_any(header)
    assert parsed is not None
    assert (parsed[0].source, parsed[0].destination) == (("10.0.0.77", 40000), ("10.0.0.9", 443))
    assert header.startswith(b"PROXY TCP4 " if asked == "v1" else proxy_protocol.SIGNATURE)


@pytest.mark.interop
@pytest.mark.parametrize("kind", WEBSERVERS)
async def test_real_servers_read_whose_connection_it_is(tmp_path: Path, kind: str) -> None:
    """Of whichever family the client is, the service is reached by IPv4; where client and relay differ, by way of a load balancer
    that spoke for the client, the line is of the one family that holds both."""
    with webserver(kind, tmp_path / kind) as port:
        for asked in ("v1", "v2"):
            delivering = delivery(service(f"127.0.0.1:{port}", proxy_protocol=asked))
            for client, local, seen in (
                (("198.51.100.7", 40000), ("10.0.0.9", 443), ("198.51.100.7", "10.0.0.9")),
                (("2001:db8::7", 1), ("2001:db8::9", 443), ("2001:db8::7", "2001:db8::9")),
                (("2001:db8::7", 65535), ("10.0.0.9", 443), ("2001:db8::7", "::ffff:10.0.0.9")),
                (("198.51.100.7", 40000), ("2001:db8::9", 443), ("::ffff:198.51.100.7", "2001:db8::9")),
            ):
                delivered = await delivering.connect(preamble(f"{NAME}:8443", client=client, local=local))
                await delivered.stream.send(b"GET / HTTP/1.0\r\n\r\n")
                answer = b""
                while data := await delivered.stream.recv():
                    answer += data
                delivered.stream.close()
                # The servers spell IPv4-mapped addresses in their own ways.
                host, client_port, destination = answer.decode().splitlines()[-1].split(" ")
                assert (ip_address(host), ip_address(destination)) == tuple(map(ip_address, seen)), asked
                assert int(client_port) == client[1]


# --- what is not ----------------------------------------------------------------------------------------------------


async def test_an_address_that_does_not_answer() -> None:
    error = await refused(delivery(), f"127.0.0.1:{closed_port()}")
    assert error.reason is Reason.DIAL_FAILED
    assert "Connection refused" in error.detail


async def test_an_address_that_is_silent() -> None:
    with socket.socket() as server:  # a full backlog
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(1)]
        error = await refused(delivery(dial_timeout_s=0.1), f"127.0.0.1:{port}")
        for sock in waiting:
            sock.close()
    assert error.reason is Reason.DIAL_FAILED
    assert "no answer in 0.1 s" in error.detail


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("unknown.shop.example:8443", Reason.UNKNOWN_NAME),
        (f"{NAME}:9443", Reason.NO_ENDPOINT),
        ("empty.shop.example:8443", Reason.NO_ENDPOINT),
        ("odd.shop.example:8443", Reason.NO_ENDPOINT),
        ("192.0.2.1:8443", Reason.DENIED),
        ("169.254.169.254:80", Reason.DENIED),
        ("0.0.0.0:80", Reason.DENIED),
        ("[::]:80", Reason.DENIED),
        ("[fe80::1]:80", Reason.DENIED),
    ],
)
async def test_targets_that_are_refused(target: str, reason: Reason) -> None:
    records = [
        service("127.0.0.1:1"),
        service(name="empty.shop.example"),
        service("no endpoint", name="odd.shop.example"),
    ]
    assert (await refused(delivery(*records), target)).reason is reason


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "ff02::1",
    ],
)
@pytest.mark.parametrize("by", ["address", "service"])
async def test_refused_ranges_although_everything_is_allowed(address: str, by: str) -> None:
    endpoint = f"[{address}]:80" if ":" in address else f"{address}:80"
    delivering = delivery(service(endpoint), allow=TargetList.parse(["0.0.0.0/0", "[::/0]"]))
    error = await refused(delivering, endpoint if by == "address" else f"{NAME}:8443")
    assert error.reason is Reason.DENIED
    assert "may" not in error.detail
    assert endpoint in error.detail


@pytest.mark.parametrize(
    "endpoint", ["[::ffff:169.254.169.254]:80", "2852039166:80", "0xa9fea9fe:80", "0251.0376.0251.0376:80"]
)
async def test_other_spellings_in_a_record(endpoint: str) -> None:
    delivering = delivery(service(endpoint), allow=TargetList.parse(["0.0.0.0/0", "[::/0]"]))
    assert (await refused(delivering, f"{NAME}:8443")).reason in {Reason.DENIED, Reason.NO_ENDPOINT}


async def test_ports_that_are_not_allowed() -> None:
    async with services() as (endpoint,):
        port = int(endpoint.rpartition(":")[2])
        only_another = delivery(allow=TargetList.parse([f"127.0.0.0/8:{port - 1}"]))
        assert (await refused(only_another, endpoint)).reason is Reason.DENIED


@pytest.mark.parametrize("endpoint", ["[64:ff9b::a01:5]:7443", "[2002:a01:5::]:7443"])
async def test_the_loop_guard_knows_translated_addresses(endpoint: str) -> None:
    records = [record(Kind.GATEWAY, "b", "gw-1", GatewaySpec(address="10.1.0.5:7443"))]
    error = await refused(delivery(*records, allow=TargetList.parse(["[::/0]"])), endpoint)
    assert error.reason is Reason.DENIED
    assert "would loop" in error.detail


@pytest.mark.parametrize("part", ["relay", "gateway", "turn", "another network's turn", "configured", "anywhere"])
async def test_the_loop_guard(part: str) -> None:
    """A stream to a part of crossnet itself would loop, so these addresses are never dialled."""
    async with services() as (endpoint,):
        port = int(endpoint.rpartition(":")[2])
        turn = TurnSpec(
            url=f"turn:{endpoint}?transport=tcp", relay_addresses=["127.0.0.1"], port_min=49152, port_max=65535
        )
        records: dict[str, AnyRecord] = {
            "relay": record(Kind.RELAY, "b", "relay-1", RelaySpec(addresses=["127.0.0.1"], ports=[port])),
            "gateway": record(Kind.GATEWAY, "b", "gw-1", GatewaySpec(address=endpoint)),
            "turn": record(Kind.TURN, "b", "turn-1", turn),
            "another network's turn": record(Kind.TURN, "c", "turn-1", turn),
        }
        guard = {"configured": [("127.0.0.1", port)], "anywhere": [("0.0.0.0", port)]}.get(part, [])
        delivering = delivery(*([records[part]] if part in records else []), service(endpoint), guard=guard)
        for target in (endpoint, f"{NAME}:8443"):
            error = await refused(delivering, target)
            assert error.reason is Reason.DENIED
            assert "would loop" in error.detail


async def test_rules_decide_after_all_that_is_never_allowed() -> None:
    async with services(2) as (one, other):
        delivering = delivery(
            service(one, other),
            rules=[
                Rule.parse(action="deny", sources=["a"], to=[one.replace(":", "/32:")]),
                Rule.parse(action="allow", sources=["10.0.0.0/24"]),
            ],
        )
        for _ in range(3):
            delivered = await delivering.connect(preamble(f"{NAME}:8443"))
            assert delivered.endpoint == other
            delivered.stream.close()
        assert "rule 1 denies" in (await refused(delivering, one)).detail
        with pytest.raises(Undeliverable, match="no rule allows"):
            await delivering.connect(asking(other, client=("10.9.0.1", 40000)))


async def test_cancelled_while_dialling() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await delivery().connect(asking(f"127.0.0.1:{port}"))
