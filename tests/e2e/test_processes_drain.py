"""SIGTERM to a relay and to a gateway: open streams may finish, new ones go elsewhere, and the exit code names the signal."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from sniproxy.engine import SocketStream
from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.talk import talking

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ENDED_BY_SIGTERM = 143


def drain(limit: str) -> Any:
    def change(document: dict[str, Any]) -> None:
        document["drain"] = limit

    return change


def drain_relay(limit: str) -> Any:
    """Set `drain`, and a `dns` section, from which a relay learns the TTL even if another process runs that role."""

    def change(document: dict[str, Any]) -> None:
        document |= {
            "drain": limit,
            "dns": {"listen": "127.0.0.1:0", "upstream": "127.0.0.1", "ttl": "1s", "search": []},
        }

    return change


async def refused(mesh: Mesh) -> bool:
    try:
        stream: SocketStream = await mesh.connect()
    except ConnectionRefusedError:
        return True
    stream.close()
    return False


async def test_a_draining_relay_lets_its_streams_finish(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, Loopback(), changes={"relay": drain_relay("30s")}, roles={"relay": ["relay"]})
    with running_mesh(mesh):
        async with talking(mesh) as talk:
            held = [await talk.hold() for _ in range(3)]
            mesh["relay"].send_signal(signal.SIGTERM)
            await mesh.eventually("it reports that it is not ready", lambda: not mesh.ready("relay"))
            await mesh.eventually("its record is withdrawn", lambda: not mesh.records("gateway", "relay"))
            await mesh.eventually("it accepts no more connections", lambda: refused(mesh))
            assert mesh["relay"].alive
            for one in held:
                await one.ping()
            for one in held:
                await one.end()
            assert await asyncio.to_thread(mesh["relay"].exit_code) == ENDED_BY_SIGTERM
        assert [event["reason"] for event in mesh.events("relay") if "sni" in event] == ["ok"] * len(held)
        assert mesh.events("relay", "cut") == []


async def test_a_draining_relay_serves_clients_with_an_old_dns_answer(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, Loopback(), changes={"relay": drain_relay("30s")}, roles={"relay": ["relay"]})
    with running_mesh(mesh):
        async with talking(mesh) as talk:
            mesh["relay"].send_signal(signal.SIGTERM)
            await mesh.eventually("its record is withdrawn", lambda: not mesh.records("gateway", "relay"))
            await talk.once()


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_a_draining_gateway_lets_its_streams_finish_while_another_takes_new_ones(
    tmp_path: Path,
) -> None:
    mesh = Mesh(tmp_path, Loopback(), turn="coturn", gateways=2, changes={"gateway": drain("30s")})
    with running_mesh(mesh):
        async with talking(mesh) as talk:
            held = [await talk.hold() for _ in range(12)]
            own = len(mesh.ask("gateway", "/streams")["gateway"])
            assert 0 < own < len(held), "both gateways have streams"
            async with talk.repeating(0.005):
                await talk.once()
                mesh["gateway"].send_signal(signal.SIGTERM)
                await mesh.eventually(
                    "its allocation is withdrawn",
                    lambda: {record["spec"]["gateway"] for record in mesh.records("relay", "allocation")} == {"gw-2"},
                )
                await talk.at_once(30)
            assert mesh["gateway"].alive
            for one in held:
                await one.ping()
            for one in held:
                await one.end()
            assert await asyncio.to_thread(mesh["gateway"].exit_code) == ENDED_BY_SIGTERM
            await talk.at_once(10)
        assert {event["reason"] for event in mesh.events("relay")} == {"ok"}
        assert mesh.events("gateway", "cut") == []


async def test_streams_are_cut_with_a_reset_when_the_drain_time_is_over_or_at_a_second_signal(
    tmp_path: Path,
) -> None:
    mesh = Mesh(tmp_path, Loopback(), changes={"gateway": drain("300ms"), "relay": drain("10m")})
    with running_mesh(mesh):
        async with talking(mesh) as talk:
            held = await talk.hold()
            mesh["gateway"].send_signal(signal.SIGTERM)
            await held.cut()
            assert await asyncio.to_thread(mesh["gateway"].exit_code) == ENDED_BY_SIGTERM
            assert [event["streams"] for event in mesh.events("gateway", "cut")] == [1]
            mesh.start("gateway")
            await mesh.eventually("the gateway is back", mesh.converged)
            held = await talk.hold()
            mesh["relay"].send_signal(signal.SIGTERM)
            await mesh.eventually("it is draining", lambda: mesh.events("relay", "draining"))
            mesh["relay"].send_signal(signal.SIGINT)
            await held.cut()
            assert await asyncio.to_thread(mesh["relay"].exit_code) == ENDED_BY_SIGTERM
