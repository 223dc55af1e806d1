"""The RFC 6062 client against real servers: coturn, and the embedded one."""

import asyncio
import contextlib
import time

import pytest

from tests.support.coturn import Coturn
from tests.support.turn_client import Client, code
from tests.support.turn_servers import (
    BOTH,
    COTURN,
    LOGIN,
    LOOPBACK,
    RunningServer,
    allocation_on,
    held,
    listens,
    turn_server,
)
from tests.support.waiting import eventually, wait_until
from turnreg.client.allocation import BindResult, Bound, Credentials, Timing, TurnError, TurnReason
from turnreg.stun.auth import rest_credentials
from turnreg.stun.message import FAMILY_IPV6

pytestmark = pytest.mark.anyio


async def failure(server: RunningServer, credentials: Credentials = LOGIN) -> TurnError:
    """Run an allocation that must fail, and return why."""
    allocation = allocation_on(server, asyncio.Queue(), [], credentials=credentials)
    with pytest.raises(TurnError) as raised:
        async with asyncio.timeout(10):
            await allocation.run()
    return raised.value


@pytest.mark.parametrize("kind", BOTH)
async def test_a_peer_becomes_a_stream(kind: str) -> None:
    with turn_server(kind) as server:
        async with held(server) as holding:
            allocation = holding.allocation
            assert allocation.relayed is not None
            assert allocation.mapped is not None
            assert allocation.mapped[0] == "127.0.0.1"
            assert allocation.lifetime_s == 600
            assert allocation.permissions.granted == LOOPBACK
            reader, writer = await holding.peer()
            bound = await holding.stream()
            assert bound.peer == writer.get_extra_info("sockname")
            assert (bound.via, bound.turn, bound.allocation) == ("a", "turn-1", "gw-1.a.turn-1")
            writer.write(b"from the peer")
            assert await bound.stream.recv_exactly(13) == b"from the peer"
            await bound.stream.send(b"from the service")
            assert await reader.readexactly(16) == b"from the service"
            assert holding.results == [BindResult.OK]
            relayed = allocation.relayed
            writer.close()
        await eventually(lambda: not listens(relayed))  # given back at once, not when its lifetime ends


@pytest.mark.parametrize("kind", BOTH)
async def test_bytes_before_the_bind_come_first_and_none_is_read_with_the_answer(kind: str) -> None:
    with turn_server(kind) as server:
        async with held(server) as holding:
            _, writer = await holding.peer()
            early = bytes(range(256)) * 32  # 8 KiB in one write: what our relay sends before READY
            writer.write(early)
            bound = await holding.stream()
            writer.write(b"later")
            assert await bound.stream.recv_exactly(len(early) + 5) == early + b"later"
            writer.close()


@pytest.mark.parametrize("kind", BOTH)
async def test_three_hundred_peers_at_once(kind: str) -> None:
    count = 300
    with turn_server(kind) as server:
        async with held(server) as holding:
            peers = {}
            for number in range(count):
                _, writer = await holding.peer()
                writer.write(b"%06d" % number)
                peers[writer.get_extra_info("sockname")] = (number, writer)
            for _ in range(count):
                bound = await holding.stream()
                number, writer = peers.pop(bound.peer)
                assert await bound.stream.recv_exactly(6) == b"%06d" % number
                writer.close()
            assert not peers
            assert holding.results == [BindResult.OK] * count


def outlive_a_nonce(server: RunningServer) -> None:
    """Wait until the server has refused two nonces, one after the other: every nonce from before has expired by then.

    With one it is not certain: coturn takes the time from whole seconds, and not at the same moment in all its threads.
    """
    with Client((server.address, server.port)) as client:
        client.allocate()
        for _ in range(2):
            assert wait_until(lambda: code(client.refresh(600)) == 438, interval_s=0.05)


@pytest.mark.parametrize("kind", BOTH)
async def test_a_stream_after_idling_past_the_nonce(kind: str) -> None:
    with turn_server(kind, nonce_lifetime_s=1) as server:
        async with held(server) as careful, held(server, timing=Timing(nonce_fresh_s=1e9)) as careless:
            await asyncio.to_thread(outlive_a_nonce, server)
            _, writer = await careful.peer()
            writer.write(b"x")
            assert await (await careful.stream()).stream.recv_exactly(1) == b"x"
            writer.close()
            # Shows that the above tests something, and that a 438 that can be read is answered with a second bind.
            _, writer = await careless.peer()
            await eventually(lambda: careless.results)
            assert careless.results == [BindResult.RESET if kind == "coturn" else BindResult.OK]
            writer.close()


@pytest.mark.parametrize("kind", BOTH)
async def test_wrong_password(kind: str) -> None:
    with turn_server(kind) as server:
        error = await failure(server, Credentials(username="u", password="not p"))
        assert (error.reason, error.code) == (TurnReason.UNAUTHORIZED, 401)
        error = await failure(server, Credentials(username="nobody", password="p"))
        assert (error.reason, error.code) == (TurnReason.UNAUTHORIZED, 401)


@pytest.mark.parametrize("kind", BOTH)
async def test_quota(kind: str) -> None:
    with turn_server(kind, quota=1) as server:
        async with held(server):
            error = await failure(server)
            assert (error.reason, error.code) == (TurnReason.QUOTA, 486)


@pytest.mark.parametrize("kind", BOTH)
async def test_rest_credentials(kind: str) -> None:
    with turn_server(kind, secret="north") as server:
        username, password = rest_credentials("north", "b.gw-1", time.time() + 60)
        async with held(server, credentials=Credentials(username=username, password=password)) as holding:
            _, writer = await holding.peer()
            await holding.stream()
            writer.close()
        username, password = rest_credentials("north", "b.gw-1", time.time() - 60)
        error = await failure(server, Credentials(username=username, password=password))
        assert error.reason is TurnReason.UNAUTHORIZED


@pytest.mark.parametrize("kind", BOTH)
async def test_ipv6(kind: str) -> None:
    with turn_server(kind, address="::1") as server:
        async with held(server, peers=frozenset({"::1", "127.0.0.1"}), family=FAMILY_IPV6) as holding:
            assert holding.allocation.permissions.granted == {"::1"}
            assert "family" in holding.allocation.permissions.refused["127.0.0.1"]
            _, writer = await holding.peer()
            bound = await holding.stream()
            assert bound.peer == writer.get_extra_info("sockname")[:2]
            writer.close()


async def refused_peer(server_says_no: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert await server_says_no.read() == b""


@pytest.mark.parametrize("kind", BOTH)
async def test_permissions_follow_what_is_allowed(kind: str) -> None:
    with turn_server(kind) as server:
        async with held(server, peers=frozenset()) as holding:
            with contextlib.suppress(ConnectionResetError):
                reader, writer = await holding.peer()
                await refused_peer(reader)
                writer.close()
            holding.allocation.allow(frozenset({"127.0.0.1", "127.0.0.3"}))
            await eventually(lambda: holding.allocation.permissions.granted == {"127.0.0.1", "127.0.0.3"})
            _, writer = await holding.peer("127.0.0.3")
            assert (await holding.stream()).peer[0] == "127.0.0.3"
            writer.close()
            # The server keeps the permission for a while; we do not bind the peer.
            holding.allocation.allow(LOOPBACK)
            _, writer = await holding.peer("127.0.0.3")
            await eventually(lambda: len(holding.results) == 2)
            assert holding.results == [BindResult.OK, BindResult.NOT_ALLOWED]
            writer.close()


@pytest.mark.parametrize("kind", BOTH)
async def test_an_address_that_the_server_refuses_spoils_no_other(kind: str) -> None:
    wanted = frozenset({"0.0.0.0", "127.0.0.1", "127.0.0.2", "127.0.0.3", "::1", "::ffff:127.0.0.1", "not an address"})
    with turn_server(kind) as server:
        async with held(server, peers=wanted) as holding:
            permissions = holding.allocation.permissions
            assert permissions.granted == {"127.0.0.1", "127.0.0.2", "127.0.0.3"}
            assert permissions.refused.keys() == {"0.0.0.0", "::1"}
            assert "403" in permissions.refused["0.0.0.0"]


@pytest.mark.parametrize("kind", BOTH)
async def test_permissions_and_lifetime_are_refreshed(kind: str) -> None:
    timing = Timing(permission_refresh_s=0.2, lifetime_s=600)
    with turn_server(kind) as server:
        async with held(server, timing=timing) as holding:
            permissions = holding.allocation.permissions
            asked = permissions._due["127.0.0.1"]
            await eventually(lambda: permissions._due["127.0.0.1"] > asked)


async def test_no_server() -> None:
    error = await failure(RunningServer("127.0.0.1", 1))
    assert error.reason is TurnReason.CONNECT_FAILED
    assert error.detail == "Connection refused"


@COTURN.marks[0]  # type: ignore[index,untyped-decorator]
@COTURN.marks[1]  # type: ignore[index,untyped-decorator]
async def test_a_killed_server_ends_the_allocation() -> None:
    server = Coturn()
    try:
        server.start()
        streams: asyncio.Queue[Bound] = asyncio.Queue()
        allocation = allocation_on(RunningServer(server.address, server.port), streams, [])
        with pytest.raises(TurnError) as raised:
            async with asyncio.timeout(10):
                await allocation.run(server.kill)
        assert raised.value.reason is TurnReason.CONNECTION_LOST
    finally:
        server.close()


async def test_cancelling_drops_everything() -> None:
    with turn_server("embedded") as server:
        allocation = allocation_on(server, asyncio.Queue(), [])
        ready = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(allocation.run(ready.set))
            async with asyncio.timeout(10):
                await ready.wait()
            running.cancel()
        relayed = allocation.relayed
        assert relayed is not None
        await eventually(lambda: not listens(relayed))


async def test_closing_before_it_is_ready() -> None:
    with turn_server("embedded") as server:
        allocation = allocation_on(server, asyncio.Queue(), [])
        await allocation.close()
        async with asyncio.timeout(10):
            await allocation.run()
        assert allocation.relayed is None


async def test_a_fault_in_the_callback_ends_that_stream_alone(caplog: pytest.LogCaptureFixture) -> None:
    with turn_server("embedded") as server:
        async with held(server) as holding:
            good = holding.allocation._on_stream

            def bad(bound: Bound) -> None:
                raise RuntimeError("no")

            holding.allocation._on_stream = bad
            reader, writer = await holding.peer()
            await refused_peer(reader)
            writer.close()
            holding.allocation._on_stream = good
            _, writer = await holding.peer()
            await holding.stream()
            writer.close()
            assert "RuntimeError: no" in caplog.text


@pytest.mark.parametrize("kind", BOTH)
async def test_credentials_that_a_clock_makes_bad_say_so(kind: str) -> None:
    """A gateway with a wrong clock makes names that have already expired by the server's clock."""
    with turn_server(kind, secret="north") as server:
        late, good = (rest_credentials("north", "gw", time.time() + left) for left in (-60, 600))
        error = await failure(server, Credentials(username=late[0], password=late[1]))
        assert error.reason is TurnReason.UNAUTHORIZED
        assert "expired 60 s ago by our clock" in error.detail or "expired 61 s ago by our clock" in error.detail
        if kind == "embedded":
            assert "s ago by this server's clock" in error.detail
        error = await failure(server, Credentials(username=good[0], password="another secret's"))
        assert "s more by our clock" in error.detail
