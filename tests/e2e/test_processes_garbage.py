"""Garbage at every port of every process: all processes survive, still serve, leak nothing, and log no error."""

import asyncio
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discovery.model.addresses import parse_endpoint
from sniproxy.engine import SocketStream, connect
from tests.support.hellos import client_hello, message, records, supported_versions
from tests.support.processes import Loopback, Mesh, running_mesh
from tests.support.talk import talking
from tests.support.waiting import LIMIT_S

pytestmark = pytest.mark.anyio

PROXY_SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
STUN_COOKIE = bytes.fromhex("2112a442")
HELLO = client_hello("p1-10-0-0-1.nowhere.svc.mesh.internal")
ROUNDS = 4

Endpoint = tuple[str, int]


def endpoint(text: str) -> Endpoint:
    address, port = parse_endpoint(text)
    return str(address), port


async def say(at: Endpoint, data: bytes, *, wait: bool = True, reset: bool = False) -> None:
    """Connect and send data, optionally read to the end, then close or reset."""
    stream = await connect(*at, timeout_s=LIMIT_S)
    try:
        await stream.send(data)
        if wait:
            stream.shutdown_write()
            while await stream.recv():
                pass
    except OSError:
        pass  # it closes before it has read everything
    finally:
        if reset:
            stream.reset()
        stream.close()


def random_bytes(dice: random.Random) -> bytes:
    return dice.randbytes(dice.choice((1, 20, 300, 5000)))


def stun(dice: random.Random) -> bytes:
    length = dice.choice((0, 4, 8, 0xFFFC, 0xFFFF))
    kind = dice.choice((0x0001, 0x0003, 0x000B, 0x0111, 0x3FFF))
    return kind.to_bytes(2, "big") + length.to_bytes(2, "big") + STUN_COOKIE + dice.randbytes(12 + min(length, 64))


def proxy(dice: random.Random) -> bytes:
    length = dice.choice((0, 12, 200, 1024, 0xFFFF))
    rest = dice.choice((b"\x20\x00", b"\x21\x11", b"\x21\x21", b"\xff\xff")) + length.to_bytes(2, "big")
    return PROXY_SIGNATURE + rest + dice.randbytes(min(length, 2048))


def http(dice: random.Random) -> bytes:
    lines = (
        b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET " + b"a" * 70_000,
        b"POST /v1/leases HTTP/1.1\r\n" * 3,
        b"\r\n" * 999,
    )
    return dice.choice(lines)


def hello(dice: random.Random) -> bytes:
    nameless = records(message(supported_versions(0x0304)))
    return dice.choice((nameless, HELLO, HELLO[:40], HELLO[:-1], HELLO + dice.randbytes(3000)))


GARBAGE: dict[str, Callable[[random.Random], bytes]] = {
    "random bytes": random_bytes,
    "STUN-like messages": stun,
    "PROXY-like headers": proxy,
    "HTTP-like requests": http,
    "hellos": hello,
}


async def pour(at: Endpoint) -> None:
    """Send every kind of garbage to one port."""
    dice = random.Random(repr(at))
    for _ in range(ROUNDS):
        for make in GARBAGE.values():
            await say(at, make(dice))
            await say(at, make(dice), wait=False)
            await say(at, make(dice), wait=False, reset=True)
        await say(at, b"")
        await say(at, b"", wait=False, reset=True)
    await say(at, bytes(1_000_000))


async def half_open(at: Endpoint) -> list[SocketStream]:
    """Open connections that send an incomplete message."""
    streams = [await connect(*at, timeout_s=LIMIT_S) for _ in range(10)]
    for stream, start in zip(
        streams, (b"", b"\x16", HELLO[:50], PROXY_SIGNATURE, b"GET /", b"\x00\x03") * 2, strict=False
    ):
        await stream.send(start)
    return streams


def datagrams(at: Endpoint) -> None:
    dice = random.Random(repr(at))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for size in (0, 1, 11, 12, 13, 50, 512, 9000, 60_000):
            sender.sendto(dice.randbytes(size), at)
            sender.sendto(bytes(size), at)
            sender.sendto(b"\xff" * size, at)


def with_a_listener(document: dict[str, Any]) -> None:
    document["gateway"]["listen"] = ["{}:0".format(document["admin"].rpartition(":")[0])]


async def settled(mesh: Mesh, parts: list[str], before: dict[str, int]) -> None:
    await mesh.eventually(
        f"as few descriptors as before: {before}",
        lambda: all(mesh[part].descriptors() <= before[part] for part in parts),
    )


@pytest.mark.timeout(120)
async def test_every_process_survives_garbage_at_every_port(tmp_path: Path) -> None:
    ground = Loopback()

    def by_way_of_turn(document: dict[str, Any]) -> None:
        document["relay"]["direct"] = [
            f"{ground.plan.turn}/32"
        ]  # so that streams do not use the gateway's own listener

    changes = {"gateway": with_a_listener, "relay": by_way_of_turn}
    with running_mesh(Mesh(tmp_path, ground, dns=True, changes=changes)) as mesh:
        parts = mesh.names
        ports = {
            (part, role): endpoint(text)
            for part in parts
            for role, texts in mesh.ask(part, "/status")["listening"].items()
            for text in texts
        }
        for line in mesh.registrations():
            ports["turn", line["record"]] = (line["relayed"][0], line["relayed"][1])
        assert {role for _, role in ports} > {"admin", "discovery_server", "turn", "relay", "gateway", "dns"}
        async with talking(mesh) as talk:
            await talk.at_once(20)
            await settled(mesh, parts, before := {part: mesh[part].descriptors() for part in parts})
            opened = [stream for at in ports.values() for stream in await half_open(at)]
            async with asyncio.TaskGroup() as group:
                for at in ports.values():
                    group.create_task(pour(at))
                datagrams(ports["dns", "dns"])
                await talk.at_once(5)
            for stream in opened:
                stream.close()
            for part in parts:
                assert mesh[part].alive, part
                assert mesh.ready(part), part
            await talk.at_once(20)
            await settled(mesh, parts, before)
        for part in parts:
            assert [line for line in mesh.lines(part) if '"level":"error"' in line] == [], part
