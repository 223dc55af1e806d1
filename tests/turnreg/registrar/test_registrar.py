"""The registrar, with real TURN servers and a discovery that is set by hand."""

import asyncio
import time

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from discovery.client.contract import IssuedCredentials
from discovery.model.addresses import TargetList
from discovery.model.mesh import Kind, Record, TurnSpec
from discovery.model.spec import is_record_id
from tests.support.coturn import Coturn
from tests.support.embedded_turn import embedded
from tests.support.registered import ID, HandDiscovery, allocation, rank, registrar, relay, turn
from tests.support.scripted_turn import scripted
from tests.support.turn_servers import BOTH, COTURN, LOGIN, RunningServer, listens, turn_server
from tests.support.waiting import eventually
from turnreg.client.allocation import Credentials, Timing, TurnReason
from turnreg.registrar import registration_state
from turnreg.registrar.registrar import (
    Issued,
    Register,
    Registrar,
    RegistrarConfig,
    RestSecret,
    Retry,
    record_id,
)
from turnreg.server import Limits
from turnreg.stun.auth import rest_credentials
from turnreg.stun.message import Method

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", BOTH)
async def test_a_registration_from_record_to_stream(kind: str) -> None:
    with turn_server(kind) as server:
        relays = relay({"turn-1": ["127.0.0.1"], "turn-2": ["127.0.0.2"]})
        stranger = relay({"turn-1": ["127.0.0.3"]}, network="c")
        async with registrar(turn(server), relays, stranger) as ours:
            spec = await ours.publishes(ID)
            assert (spec.via, spec.turn, spec.gateway, spec.proto) == ("a", "turn-1", "gw-1", ["framed/1"])
            status = ours.of()
            assert (status["state"], status["permissions"]) == ("ready", ["127.0.0.1"])
            assert status["relayed"] == ["127.0.0.1", spec.port]
            assert ours.registrar.servers == {(server.address, server.port)}
            bound, writer = await ours.stream(spec.port)
            assert (bound.came_by, bound.addressee) == ({"via": "a", "turn": "turn-1"}, ID)
            bound.stream.close()
            writer.close()
            assert ours.count("allocations") == 1
            assert ours.count("registrations_total", reason="ok") == 1
            assert ours.count("registrations_total", reason="quota") == 0
            assert ours.count("binds_total", result="ok") == 1
            assert ours.count("binds_total", result="reset") == 0
        await eventually(lambda: not listens(("127.0.0.1", spec.port)))
        assert ours.registrar.status() == [{"via": "a", "turn": None, "state": "standby"}]
        ours.discovery.set()
        assert ours.registrar.status() == [{"via": "a", "turn": None, "state": "no_turn_record"}]


async def test_permissions_follow_the_relays() -> None:
    with turn_server("embedded") as server:
        async with registrar(turn(server)) as ours:
            spec = await ours.publishes(ID)  # without relays too: the first of them may come any time
            assert ours.of()["permissions"] == []
            ours.discovery.set(turn(server), relay({"turn-1": ["127.0.0.1"]}), relay({"turn-1": ["127.0.0.2"]}, "r-2"))
            await eventually(lambda: ours.of()["permissions"] == ["127.0.0.1", "127.0.0.2"])
            bound, writer = await ours.stream(spec.port, "127.0.0.2")
            bound.stream.close()
            writer.close()
            ours.discovery.set(turn(server), relay({"turn-1": ["127.0.0.1"]}))
            await eventually(lambda: ours.of()["permissions"] == ["127.0.0.1"])


async def test_a_relay_that_withdrew_is_admitted_for_a_while() -> None:
    """It drains: clients whose resolver still names it come through it."""
    with turn_server("embedded") as server:
        async with registrar(turn(server), relay({"turn-1": ["127.0.0.2"]}), linger_s=1.0) as ours:
            spec = await ours.publishes(ID)
            await eventually(lambda: ours.of()["permissions"] == ["127.0.0.2"])
            ours.discovery.set(turn(server))
            bound, writer = await ours.stream(spec.port, "127.0.0.2")
            bound.stream.close()
            writer.close()
            await eventually(lambda: ours.of()["permissions"] == [])


async def test_replicas_of_one_gateway() -> None:
    with turn_server("embedded") as server:
        async with registrar(turn(server), replicas=2) as ours:
            await ours.publishes(ID, f"{ID}.2")
            assert ours.discovery.published[ID].port != ours.discovery.published[f"{ID}.2"].port
            assert ours.count("allocations") == 2


async def test_gateways_share_a_server_by_what_discovery_says_of_them() -> None:
    relays = relay({"turn-1": ["127.0.0.1"]})
    ids = sorted(("gw-1", "gw-2", "gw-3"), key=rank)
    mine = ids[1]
    with turn_server("embedded") as server:
        async with registrar(turn(server), relays, gateway=mine, replicas=2) as ours:
            first = record_id(mine, "a", "turn-1")
            await ours.publishes(first, f"{first}.2")
            bound, writer = await ours.stream(ours.discovery.published[f"{first}.2"].port)
            # One more that comes after us in order takes the second one, as its record says; ours goes on without a record.
            ours.discovery.set(turn(server), relays, allocation(ids[2]))
            await ours.publishes(first)
            writer.write(b"still there")
            assert await bound.stream.recv_exactly(11) == b"still there"
            bound.stream.close()
            writer.close()
            # Two that come before us: we stand by.
            ours.discovery.set(turn(server), relays, allocation(ids[0]), allocation(ids[2]))
            assert ours.discovery.published.keys() == {first}
            ours.discovery.set(turn(server), relays, allocation(ids[0]), allocation("gw-5"), allocation("gw-6"))
            shares = [rank(gateway) for gateway in (mine, ids[0], "gw-5", "gw-6")]
            await eventually(lambda: (first in ours.discovery.published) == (sorted(shares).index(shares[0]) < 2))
            # The others go, and their leased records with them.
            ours.discovery.set(turn(server), relays)
            await ours.publishes(first, f"{first}.2")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("replicas", [1, 2, 3])
async def test_shares_add_up(count: int, replicas: int) -> None:
    """Whoever sees all the others' records and asks, the shares of all are what is wanted, however many they are."""
    gateways = [f"gw-{number}" for number in range(count)]
    shares = []
    for gateway in gateways:
        config = RegistrarConfig(network="b", gateway=gateway, turn={}, replicas=replicas)
        ours = Registrar(config, HandDiscovery(), CollectorRegistry())
        shares.append(ours._share(set(gateways), "a", "turn-1"))
    assert sum(shares) == replicas
    assert max(shares) <= -(-replicas // count)


async def test_only_where_we_are_asked_for() -> None:
    relays = relay({"turn-1": ["127.0.0.1"]})
    with turn_server("embedded") as server:
        async with registrar(turn(server), relays, register=Register.IMPORTED) as ours:
            assert ours.registrar.status() == [{"via": "a", "turn": None, "state": "standby"}]
            ours.discovery.set(turn(server), relays, relay({}, "relay-2", asks=["c", "b"]))
            port = (await ours.publishes(ID)).port
            bound, writer = await ours.stream(port)
            ours.discovery.set(turn(server), relays, relay({}, "relay-2", asks=["c"]))
            await eventually(lambda: not ours.discovery.published)
            writer.write(b"still there")
            assert await bound.stream.recv_exactly(11) == b"still there"
            bound.stream.close()
            writer.close()
            ours.discovery.set(turn(server), relays, relay({}, "relay-2", asks=["b"]))
            await ours.publishes(ID)


@pytest.mark.parametrize("kind", BOTH)
async def test_a_server_whose_record_has_only_ipv6_addresses_is_asked_for_one(kind: str) -> None:
    with turn_server(kind, address="::1") as server:
        here = turn(server, url=f"turn:[::1]:{server.port}?transport=tcp")
        async with registrar(here, relay({"turn-1": ["::1", "127.0.0.1"]}), allowed=("::1/128",)) as ours:
            spec = await ours.publishes(ID)
            status = ours.of()
            assert status["relayed"] == ["::1", spec.port]
            assert (status["permissions"], list(status["refused"])) == (["::1"], ["127.0.0.1"])


async def test_records_come_and_go() -> None:
    with turn_server("embedded") as first, turn_server("embedded") as second:
        async with registrar(turn=dict.fromkeys(("a", "b", "c"), LOGIN)) as ours:
            assert [line["state"] for line in ours.registrar.status()] == ["no_turn_record"] * 3
            # Our own TURN servers, and those that we have no credentials for, are not for us.
            ours.discovery.set(turn(first), turn(second, "turn-2"), turn(first, network="b"), turn(first, network="d"))
            await ours.publishes(ID, "gw-1.a.turn-2")
            ours.discovery.set(turn(second, "turn-2"), turn(first, network="c"))
            await ours.publishes("gw-1.a.turn-2", "gw-1.c.turn-1")
            await eventually(lambda: len(ours.registrar.servers) == 2)
            assert ours.count("allocations") == 2


@COTURN.marks[0]  # type: ignore[index,untyped-decorator]
@COTURN.marks[1]  # type: ignore[index,untyped-decorator]
async def test_a_killed_and_restarted_server_has_us_again_and_the_other_never_lost_us() -> None:
    stock = Coturn()
    try:
        stock.start()
        restarted = RunningServer(stock.address, stock.port)
        with turn_server("embedded") as steady:
            relays = relay({"turn-1": ["127.0.0.1"], "turn-2": ["127.0.0.1"]})
            async with registrar(turn(restarted), turn(steady, "turn-2"), relays) as ours:
                await ours.publishes(ID, "gw-1.a.turn-2")
                port = ours.discovery.published["gw-1.a.turn-2"].port
                bound, writer = await ours.stream(port)
                stock.kill()
                await ours.publishes("gw-1.a.turn-2")
                await eventually(lambda: ours.count("registrations_total", reason="connect_failed") > 0)
                stock.start()
                spec = await ours.publishes(ID, "gw-1.a.turn-2")
                assert ours.discovery.published["gw-1.a.turn-2"].port == port
                again, other = await ours.stream(spec.port)
                writer.write(b"still there")
                assert await bound.stream.recv_exactly(11) == b"still there"
                assert ours.count("registrations_total", reason="connection_lost") == 1
                for wire in (bound.stream, again.stream, writer, other):
                    wire.close()
    finally:
        stock.close()


async def test_default_backoff_is_quick_where_a_server_is_gone() -> None:
    retry = Retry()
    for failures in range(1, 100):
        assert 0 <= retry.pause_s(failures, TurnReason.CONNECT_FAILED) <= 4  # + 4 s to connect: within 10 s
        assert 0 <= retry.pause_s(failures, TurnReason.UNAUTHORIZED) <= min(15, 2 ** (failures - 1))
    assert max(retry.pause_s(50, TurnReason.QUOTA) for _ in range(200)) > 8


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


async def test_a_secret() -> None:
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
    """The embedded server looks at the expiry at every refresh; two lives of the credentials cost the stream nothing."""
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


async def test_no_more_than_some_are_retired() -> None:
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
async def test_urls_that_lead_nowhere(url: str, allowed: tuple[str, ...], reason: TurnReason) -> None:
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
    """The attempt that is under way when the old address is allowed again is given up for the allocation that is still there."""
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


async def test_draining_withdraws_and_keeps_streams() -> None:
    relays = relay({"turn-1": ["127.0.0.1"]})
    with turn_server("embedded") as server:
        async with registrar(turn(server), relays) as ours:
            port = (await ours.publishes(ID)).port
            bound, writer = await ours.stream(port)
            ours.registrar.drain()
            assert ours.discovery.published == {}
            late, other = await ours.stream(port)  # a relay that has not heard of it yet
            writer.write(b"still there")
            assert await bound.stream.recv_exactly(11) == b"still there"
            ours.discovery.set(relays, turn(server), turn(server, "turn-2"))
            assert ours.of()["state"] == "draining"
            assert len(ours.registrar.status()) == 1
            await ours.registrar.close()
            with pytest.raises(ConnectionResetError):  # an end that nobody takes for a clean one
                await bound.stream.recv()
            for end in (bound.stream, writer, late.stream, other):
                end.close()


async def test_handing_over_leaves_the_record_to_the_successor_and_keeps_streams() -> None:
    with turn_server("embedded") as server:
        async with registrar(turn(server), relay({"turn-1": ["127.0.0.1"]})) as ours:
            assert not ours.registrar.settled
            port = (await ours.publishes(ID)).port
            assert ours.registrar.settled
            bound, writer = await ours.stream(port)  # type: ignore[unreachable]
            ours.registrar.hand_over()
            late, other = await ours.stream(port)
            writer.write(b"still there")
            assert await bound.stream.recv_exactly(11) == b"still there"
            assert ours.of()["state"] == "draining"
            await ours.registrar.close()
            assert ours.discovery.published.pop(ID).port == port, "not withdrawn: it may be the successor's by now"
            for end in (bound.stream, writer, late.stream, other):
                end.close()


async def test_without_a_server_that_answers_it_is_settled_all_the_same() -> None:
    with turn_server("embedded") as server:
        record = turn(server)
    async with registrar(record) as ours:
        await eventually(lambda: ours.registrar.settled)
        assert ours.discovery.published == {}


async def test_an_unexpected_error_hurts_one_registration_only(caplog: pytest.LogCaptureFixture) -> None:
    with turn_server("embedded") as server:
        async with registrar(turn(server)) as ours:
            await ours.publishes(ID)
            ours.discovery.broken = True
            ours.discovery.set(turn(server), turn(server, "turn-2"))
            await eventually(lambda: ours.count("registrations_total", reason="internal") > 1)
            assert ours.discovery.published.keys() == {ID}
            assert "RuntimeError" in caplog.text
            ours.discovery.broken = False
            await ours.publishes(ID, "gw-1.a.turn-2")


async def test_a_port_outside_the_record_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with turn_server("embedded") as server:
        spec = TurnSpec(url=f"turn:127.0.0.1:{server.port}", relay_addresses=["127.0.0.1"], port_min=1, port_max=2)
        async with registrar(Record(kind=Kind.TURN, network="a", id="turn-1", revision=1, spec=spec)) as ours:
            await ours.publishes(ID)
            assert "relayed_port_outside" in caplog.text


async def test_cancelling_withdraws() -> None:
    with turn_server("embedded") as server:
        discovery = HandDiscovery(turn(server))
        config = RegistrarConfig(
            network="b", gateway="gw-1", turn={"a": LOGIN}, allow={"a": TargetList.parse(["127.0.0.0/8"])}
        )
        ours = Registrar(config, discovery, CollectorRegistry())
        async with asyncio.TaskGroup() as group:
            running = group.create_task(ours.run(lambda _: None))
            await eventually(lambda: discovery.published)
            running.cancel()
        assert discovery.published == {}
        assert not discovery._callbacks
        await ours.close()  # harmless


async def test_closing_while_it_registers() -> None:
    async with (
        scripted({Method.ALLOCATE: [lambda _: b""]}) as server,
        registrar(
            turn(RunningServer(server.address, server.port)), timing=Timing(close_s=0.1, transaction_s=0.1)
        ) as ours,
    ):
        await eventually(lambda: server.requests)
        await ours.registrar.close()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("gw-1", "a", "turn-1"), "gw-1.a.turn-1"),
        (("g", "v" * 30, "t" * 30), "g." + "v" * 30 + "." + "t" * 30),
    ],
)
async def test_record_ids(parts: tuple[str, str, str], expected: str) -> None:
    assert record_id(*parts) == expected


async def test_record_ids_are_apart_and_short() -> None:
    made = {
        record_id(*parts)
        for parts in [
            ("gw-1", "a", "turn-1"),
            ("gw", "1-a", "turn-1"),
            ("gw.a", "a", "turn-1"),
            ("gw", "a", "a.turn-1"),
            ("gw.a.b", "c", "d"),
            ("gw.a", "b", "c.d"),
            ("g" * 60, "a", "turn-1"),
            ("g" * 60, "a", "turn-2"),
            ("g" * 63, "v" * 63, "t" * 63),
        ]
    }
    assert len(made) == 9
    assert all(len(text) <= 63 and is_record_id(text) for text in made)
