"""One registration through changes of credentials, of addresses and of the TURN server's record."""

import asyncio
import time

import msgspec
import pytest

from discovery.client.contract import IssuedCredentials
from discovery.model.addresses import TargetList
from discovery.model.mesh import Kind, Record, TurnSpec
from tests.support.embedded_turn import embedded
from tests.support.registered import ID, registrar, relay, turn
from tests.support.turn_servers import COTURN, LOGIN, RunningServer, listens, turn_server
from tests.support.waiting import eventually
from turnreg.client.allocation import Credentials, TurnReason
from turnreg.registrar import registration_state
from turnreg.registrar.registrar import (
    Issued,
    RestSecret,
)
from turnreg.server import Limits
from turnreg.stun.auth import rest_credentials

pytestmark = pytest.mark.anyio


async def test_wrong_then_right_credentials() -> None:
    with turn_server("embedded") as server:
        async with registrar(turn(server), turn={"a": Credentials(username="u", password="wrong")}) as ours:
            await eventually(lambda: ours.count("registrations_total", reason="unauthorized") > 1)
            status = ours.of()
            assert status["published"] is False
            assert status["last_error"] == {"reason": "unauthorized", "detail": "the server answered 401 Unauthorized"}
            assert "wrong" not in str(ours.registrar.status())
            ours.reconfigure(turn={"a": LOGIN})
            port = (await ours.publishes(ID)).port
            ours.reconfigure(turn={"a": LOGIN})  # no change: nothing is lost
            failed = ours.count("registrations_total", reason="unauthorized")
            ours.reconfigure(turn={"a": Credentials(username="u", password="wrong again")})
            await eventually(lambda: ours.count("registrations_total", reason="unauthorized") > failed)
            assert ours.discovery.published[ID].port == port  # what works is kept until the other does
            assert ours.of()["state"] == "ready"
            ours.reconfigure(turn={})
            await eventually(lambda: not ours.discovery.published)
            await eventually(lambda: not listens(("127.0.0.1", port)))
            await eventually(lambda: ours.registrar.status() == [])


async def test_rest_credentials_from_a_secret() -> None:
    with turn_server("embedded", secret="north") as server:
        async with registrar(turn(server), turn={"a": RestSecret(secret="north")}) as ours:
            await ours.publishes(ID)


async def test_issued_credentials() -> None:
    with turn_server("embedded", secret="north") as server:
        async with registrar(turn(server), turn={"a": Issued()}) as ours:
            await eventually(lambda: ours.count("registrations_total", reason="no_credentials") > 1)
            assert ours.registrar.servers == frozenset()
            username, password = rest_credentials("north", "b", time.time() + 60)
            ours.discovery.issued = [IssuedCredentials(username=username, password=password, ttl_s=60, urls=())]
            await ours.publishes(ID)


async def test_credentials_are_renewed_in_place_where_the_server_allows_it() -> None:
    """The embedded server checks the expiry at every refresh. The stream survives two generations of credentials."""
    limits = Limits(default_lifetime_s=4, max_lifetime_s=4)
    relays = relay({"turn-1": ["127.0.0.1"]})
    with embedded(users={}, secrets=("north",), limits=limits) as server:
        here = turn(RunningServer(server.address, server.port))
        async with registrar(here, relays, turn={"a": Issued()}) as ours:
            ours.discovery.issue("north", ttl_s=3)
            spec = await ours.publishes(ID)
            bound, writer = await ours.stream(spec.port)
            await eventually(lambda: ours.count("renewals_total", result="in_place") == 2)
            writer.write(b"still there")
            assert await bound.stream.recv_exactly(11) == b"still there"
            late, other = await ours.stream(spec.port)  # bound with the new credentials
            assert ours.discovery.writes == 1
            assert ours.count("registrations_total", reason="ok") == 1
            for end in (bound.stream, writer, late.stream, other):
                end.close()


@COTURN.marks[0]  # type: ignore[index,untyped-decorator]
@COTURN.marks[1]  # type: ignore[index,untyped-decorator]
async def test_an_allocation_is_replaced_before_its_credentials_expire_where_the_server_allows_no_others() -> None:
    relays = relay({"turn-1": ["127.0.0.1"]})
    with turn_server("coturn", secret="north") as server:
        async with registrar(turn(server), relays, turn={"a": Issued()}, overlap_s=0.2) as ours:
            ours.discovery.issue("north", ttl_s=3)
            old = await ours.publishes(ID)
            bound, writer = await ours.stream(old.port)
            await eventually(lambda: ours.discovery.published[ID].port != old.port)
            assert ours.discovery.withdrawn == 0  # relays never saw a moment without one
            assert ours.count("renewals_total", result="replaced") >= 1
            late, other = await ours.stream(old.port)  # a relay that has not heard of it yet
            writer.write(b"still there")
            assert await bound.stream.recv_exactly(11) == b"still there"
            new, third = await ours.stream(ours.discovery.published[ID].port)
            assert old.port in {one.allocation.relayed[1] for one in ours.retired()}
            for end in (bound.stream, writer, late.stream, other, new.stream, third):
                end.close()
            await eventually(lambda: not listens(("127.0.0.1", old.port)))  # now that its streams have ended


async def test_the_number_of_retired_allocations_is_limited() -> None:
    relays = relay({"turn-1": ["127.0.0.1"]})
    with turn_server("embedded") as server:
        async with registrar(turn(server), relays, overlap_s=60) as ours:
            ports = []
            for number in range(registration_state.MAX_RETIRED + 2):
                here = turn(server)
                assert isinstance(here.spec, TurnSpec)
                spec = msgspec.structs.replace(here.spec, port_max=here.spec.port_max - number)
                ours.discovery.set(relays, Record(kind=Kind.TURN, network="a", id="turn-1", revision=1, spec=spec))
                await eventually(lambda: ours.of()["state"] == "ready" and ours.of()["relayed"][1] not in ports)
                ports.append(ours.of()["relayed"][1])
            await eventually(
                lambda: [listens(("127.0.0.1", port)) for port in ports] == [False] + [True] * (len(ports) - 1)
            )
            assert ours.of()["retired"] == registration_state.MAX_RETIRED


@pytest.mark.parametrize(
    ("url", "allowed", "reason"),
    [
        ("turn:127.0.0.1:3478?transport=tcp", (), TurnReason.REFUSED_ADDRESS),
        ("turn:169.254.169.254:80?transport=tcp", ("127.0.0.0/8",), TurnReason.REFUSED_ADDRESS),
        ("turn:[::ffff:127.0.0.1]:80?transport=tcp", ("127.0.0.0/8",), TurnReason.REFUSED_ADDRESS),
        ("turn:localhost:3478?transport=tcp", (), TurnReason.REFUSED_ADDRESS),
        ("turn:127.0.0.1:3478?transport=udp", ("127.0.0.0/8",), TurnReason.REFUSED_ADDRESS),
        ("turns:127.0.0.1:1?transport=tcp", ("127.0.0.0/8",), TurnReason.CONNECT_FAILED),
        ("turn:127.0.0.1:1?transport=tcp", ("127.0.0.0/8",), TurnReason.CONNECT_FAILED),
    ],
)
async def test_unusable_urls(url: str, allowed: tuple[str, ...], reason: TurnReason) -> None:
    async with registrar(turn(RunningServer("127.0.0.1", 1), url=url), allowed=allowed) as ours:
        await eventually(lambda: ours.count("registrations_total", reason=reason) > 0)
        assert ours.count("registrations_total", reason="ok") == 0


async def test_a_name_is_resolved_anew_for_every_registration() -> None:
    found = [["127.0.0.1"], ["169.254.169.254", "127.0.0.1"], ["169.254.169.254", "127.0.0.9", "127.0.0.1"]]
    calls = []

    async def look_up(host: str, port: int) -> list[str]:
        calls.append((host, port))
        return found[min(len(calls), len(found)) - 1]

    with turn_server("embedded") as server:
        here = turn(server, url=f"turn:turn.example:{server.port}?transport=tcp")
        wrong = Credentials(username="u", password="wrong")
        async with registrar(here, turn={"a": wrong}, look_up=look_up) as ours:
            await eventually(lambda: ours.count("registrations_total", reason="unauthorized") > 1)
            assert ours.registrar.servers <= {("127.0.0.1", server.port)}
            await eventually(lambda: ours.count("registrations_total", reason="connect_failed") > 0)
            ours.reconfigure(turn={"a": LOGIN})
            await ours.publishes(ID)  # 127.0.0.9 does not answer: the next attempt takes the next address
            assert len(calls) > 2


async def test_a_change_that_is_undone_half_way_costs_no_new_allocation() -> None:
    """When the old address is allowed again, the attempt in progress is dropped, and the old allocation is used again."""
    look_up, under_way = asyncio.Event(), asyncio.Event()

    async def slow(host: str, port: int) -> list[str]:
        under_way.set()
        await look_up.wait()
        return ["127.0.0.1"]

    with turn_server("embedded") as server:
        here = turn(server, url=f"turn:turn.example:{server.port}?transport=tcp")
        look_up.set()
        async with registrar(here, overlap_s=60, look_up=slow) as ours:
            port = (await ours.publishes(ID)).port
            look_up.clear()
            under_way.clear()
            allowed = ours.registrar.config.allow
            ours.reconfigure(allow={"a": TargetList.parse(["10.0.0.0/8"])})
            async with asyncio.timeout(10):
                await under_way.wait()
            assert not ours.discovery.published
            ours.reconfigure(allow=allowed)
            look_up.set()
            assert (await ours.publishes(ID)).port == port
            assert not ours.retired()


async def test_another_url_moves_the_allocation() -> None:
    with turn_server("embedded") as first, turn_server("embedded") as second:
        async with registrar(turn(first)) as ours:
            port = (await ours.publishes(ID)).port
            ours.discovery.set(turn(second))
            await eventually(lambda: ours.registrar.servers == {(second.address, second.port)})
            await ours.publishes(ID)
            await eventually(lambda: not listens(("127.0.0.1", port)))


async def test_streams_outlive_a_record_that_comes_back() -> None:
    relays = relay({"turn-1": ["127.0.0.1"]})
    with turn_server("embedded") as server:
        async with registrar(turn(server), relays, linger_s=60) as ours:
            port = (await ours.publishes(ID)).port
            bound, writer = await ours.stream(port)
            ours.discovery.set(relays)
            await eventually(lambda: not ours.discovery.published)
            assert ours.of()["state"] == "lingering"
            writer.write(b"still there")
            assert await bound.stream.recv_exactly(11) == b"still there"
            ours.discovery.set(relays, turn(server))
            assert (await ours.publishes(ID)).port == port
            ours.discovery.set(relays)
            await eventually(lambda: not ours.discovery.published)
            bound.stream.close()
            writer.close()
