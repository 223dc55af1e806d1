"""The registrar, with real TURN servers and a discovery that is set by hand."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from discovery.model.mesh import Kind, Record, TurnSpec
from discovery.model.spec import is_record_id
from tests.support.coturn import Coturn
from tests.support.registered import ID, HandDiscovery, allocation, rank, registrar, relay, turn
from tests.support.scripted_turn import scripted
from tests.support.turn_servers import BOTH, COTURN, LOGIN, RunningServer, listens, turn_server
from tests.support.waiting import eventually
from turnreg.client.allocation import Timing, TurnReason
from turnreg.registrar.registrar import (
    Register,
    Registrar,
    RegistrarConfig,
    Retry,
    record_id,
)
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
    """A draining relay: clients that cached its address still use it."""
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


async def test_gateways_share_a_server_by_their_records() -> None:
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
    """The shares of any number of gateways that all see each other's records add up to the number of replicas."""
    gateways = [f"gw-{number}" for number in range(count)]
    shares = []
    for gateway in gateways:
        config = RegistrarConfig(network="b", gateway=gateway, turn={}, replicas=replicas)
        ours = Registrar(config, HandDiscovery(), CollectorRegistry())
        shares.append(ours._share(set(gateways), "a", "turn-1"))
    assert sum(shares) == replicas
    assert max(shares) <= -(-replicas // count)


async def test_register_imported_needs_a_relay_that_asks_for_us() -> None:
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
async def test_a_restarted_server_gets_a_new_allocation_and_the_other_one_keeps_its_own() -> None:
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
                for stream in (bound.stream, again.stream, writer, other):
                    stream.close()
    finally:
        stock.close()


async def test_default_backoff_is_quick_for_an_unreachable_server() -> None:
    retry = Retry()
    for failures in range(1, 100):
        assert 0 <= retry.pause_s(failures, TurnReason.CONNECT_FAILED) <= 4  # + 4 s to connect: within 10 s
        assert 0 <= retry.pause_s(failures, TurnReason.UNAUTHORIZED) <= min(15, 2 ** (failures - 1))
    assert max(retry.pause_s(50, TurnReason.QUOTA) for _ in range(200)) > 8


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


async def test_it_settles_without_a_server_that_answers() -> None:
    with turn_server("embedded") as server:
        record = turn(server)
    async with registrar(record) as ours:
        await eventually(lambda: ours.registrar.settled)
        assert ours.discovery.published == {}


async def test_an_unexpected_error_does_not_end_other_registrations(caplog: pytest.LogCaptureFixture) -> None:
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


async def test_a_port_outside_the_record_is_logged(caplog: pytest.LogCaptureFixture) -> None:
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


async def test_record_ids_are_unique_and_short() -> None:
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
