"""A TURN server, gateway or discovery server dies and comes back: what recovers, and what works in the meantime."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import TURNS, Loopback, Mesh, running_mesh
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

REGISTERED_WITHIN_S = 10.0
"""After a TURN server's restart, gateways promise to be registered within this time."""

LEASE_S = 10.0


@contextmanager
def a_mesh(folder: Path, turn: str, **options: Any) -> Iterator[Mesh]:
    with running_mesh(Mesh(folder, Loopback(), turn=turn, **options)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh for tests that restore its initial state."""
    with a_mesh(tmp_path_factory.mktemp("steady"), "embedded") as mesh:
        yield mesh


@pytest.mark.parametrize("turn", TURNS)
async def test_a_gateway_registers_again_after_its_turn_server_was_killed(tmp_path: Path, turn: str) -> None:
    with a_mesh(tmp_path, turn) as mesh:
        async with talking(mesh) as talk:
            held = await talk.hold()
            before = [line["since"] for line in mesh.registrations()]
            mesh["turn"].kill()
            await held.cut()
            mesh.start("turn")
            await mesh.eventually("the TURN server is ready", lambda: mesh.ready("turn"))
            await mesh.eventually(
                "the gateway is registered again",
                lambda: mesh.converged() and min(line["since"] for line in mesh.registrations()) > max(before),
                REGISTERED_WITHIN_S,
            )
            await talk.at_once(10)


@pytest.mark.parametrize("turn", TURNS)
async def test_a_second_gateway_takes_over_from_one_that_is_killed(tmp_path: Path, turn: str) -> None:
    with a_mesh(tmp_path, turn, gateways=2) as mesh:
        async with talking(mesh) as talk:
            held = [await talk.hold() for _ in range(16)]
            cut = len(mesh.ask("gateway", "/streams")["gateway"])
            assert 0 < cut < len(held), "both gateways have streams"
            mesh["gateway"].kill()
            # The record of the dead gateway still exists for new clients.
            assert {record["spec"]["gateway"] for record in mesh.records("relay", "allocation")} == {"gw-1", "gw-2"}
            await talk.at_once(50)
            assert talk.count == 50
            await mesh.eventually(
                "only the held streams are left",
                lambda: len(mesh.ask("gateway-2", "/streams")["gateway"]) == len(held) - cut,
            )
            lost = 0
            for one in held:
                try:
                    await one.ping()
                    await one.end()
                except OSError:
                    one.stream.close()
                    lost += 1
            assert lost == cut
            if turn == "embedded":  # the kind of TURN server does not affect leases
                await mesh.eventually(
                    "the allocation of the dead gateway is removed with its lease",
                    lambda: {record["spec"]["gateway"] for record in mesh.records("relay", "allocation")} == {"gw-2"},
                )
                await talk.at_once(10)
        reasons = [event["reason"] for event in mesh.events("relay")]
        assert reasons.count("truncated") == cut
        assert set(reasons) == {"ok", "truncated"}


async def test_streams_work_without_discovery_and_all_parts_reconnect_when_it_is_back(steady: Mesh) -> None:
    parts = ("relay", "gateway", "turn")
    async with talking(steady) as talk, all_ended_well(steady):
        held = await talk.hold()
        steady["discovery"].kill()
        await steady.eventually(
            "all parts are disconnected", lambda: not any(connected(steady, part) for part in parts)
        )
        await held.ping()
        await talk.at_once(10)
        assert all(steady[part].alive and steady.ready(part) for part in parts)
        steady.start("discovery")
        async with talk.repeating():
            await steady.eventually("all parts are connected", lambda: all(connected(steady, part) for part in parts))
            await steady.eventually("all allocations are known again", steady.converged)
        await held.ping()
        await held.end()


async def test_all_records_are_written_again_to_a_discovery_server_that_comes_back_empty(steady: Mesh) -> None:
    kinds = ("turn", "relay", "allocation")
    before = {kind: steady.records("gateway", kind)[0]["spec"] for kind in kinds}

    async def written_again() -> bool:
        records = await asyncio.to_thread(steady.records_at_the_server)
        return {record["kind"] for record in records} >= {*kinds}

    async with talking(steady) as talk, all_ended_well(steady):
        steady["discovery"].kill()
        steady.delete_store()
        steady.start("discovery")
        async with talk.repeating():
            await steady.eventually("the server has the records again", written_again)
            await steady.eventually("the relay is connected", lambda: connected(steady, "relay"))
        after = {kind: steady.records("gateway", kind)[0]["spec"] for kind in kinds}
        assert after == before
        await talk.at_once(10)


@pytest.mark.slow
async def test_streams_work_while_discovery_hangs_for_longer_than_a_lease_and_when_it_continues(steady: Mesh) -> None:
    async with talking(steady) as talk, all_ended_well(steady), talk.repeating():
        held = await talk.hold()
        steady["discovery"].send_signal(signal.SIGSTOP)
        await asyncio.sleep(LEASE_S + 1)  # the leases must expire
        await held.ping()
        steady["discovery"].send_signal(signal.SIGCONT)
        # There is no event for leases that do not expire: if it ends the unrenewed ones, it does so at once.
        await asyncio.sleep(2)
        await steady.eventually("all allocations are known again", steady.converged)
        await held.end()


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.needs("turnserver")
async def test_a_gateway_takes_a_stream_after_its_nonce_has_expired(tmp_path: Path) -> None:
    with a_mesh(tmp_path, "coturn", coturn_options=["--stale-nonce=5"]) as mesh:
        async with talking(mesh) as talk:
            await talk.once()
            await asyncio.sleep(6.5)  # the lifetime of the nonce, and coturn's delay to expire it
            await talk.once()
            # Streams across the expiry of the next nonce, whenever that is.
            async with talk.repeating(0.1):
                await asyncio.sleep(5.5)
        assert {event["reason"] for event in mesh.events("relay")} == {"ok"}


@asynccontextmanager
async def all_ended_well(mesh: Mesh) -> AsyncIterator[None]:
    """Check that every stream that ended while the block ran has the reason ok."""
    before = len(mesh.events("relay"))
    yield
    reasons = Counter(event["reason"] for event in mesh.events("relay")[before:])
    assert set(reasons) == {"ok"}, reasons


def connected(mesh: Mesh, part: str) -> bool:
    """Whether a part's view of discovery is live."""
    return bool((mesh.ask(part, "/status") or {}).get("discovery", {}).get("connected"))
