"""One side's bridge over a real connection, for tests that play the other side and the plain peer."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import pytest

from sniproxy.engine import SocketStream
from sniproxy.tunnel.bridge import BridgeTiming, StreamBridge
from sniproxy.tunnel.capsules import Control, Payload
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Opened, Ready, parse_control
from sniproxy.tunnel.state import Side
from tests.support.streams import pair

TIMING = BridgeTiming(linger_s=0.02)
"""No TURN server is between the two here that would drop what it holds at a close."""

LIMITS: dict[str, Any] = {"idle_timeout_s": 20.0, "half_close_timeout_s": 20.0, "timing": TIMING}


RELAY = pytest.mark.parametrize("half", [Side.RELAY], indirect=True, ids=["relay"])
GATEWAY = pytest.mark.parametrize("half", [Side.GATEWAY], indirect=True, ids=["gateway"])


@dataclass
class Half:
    """One side of a stream. The test plays its plain peer and the other side."""

    plain: SocketStream
    peer: CapsuleConnection
    ours: CapsuleConnection
    our_plain: SocketStream

    def bridge(self, side: Side, **options: object) -> StreamBridge:
        return StreamBridge(self.our_plain, self.ours, side, **{**LIMITS, **options})


@asynccontextmanager
async def a_half(side: Side, kind: type[CapsuleConnection] = CapsuleConnection) -> AsyncIterator[Half]:
    """An opened stream; the test makes the bridge of this side, over a connection of this kind."""
    plain, our_plain = await pair()
    relay_stream, gateway_stream = await pair()
    relay, gateway = kind(relay_stream, Side.RELAY), kind(gateway_stream, Side.GATEWAY)
    await gateway.send(Ready())
    await gateway.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
    await relay.next_message()
    await relay.next_message()
    ours, peer = (relay, gateway) if side is Side.RELAY else (gateway, relay)
    yield Half(plain, peer, ours, our_plain)
    for stream in (plain, our_plain, relay_stream, gateway_stream):
        stream.close()


async def payload_of(connection: CapsuleConnection, *, until: type[object] | None = None) -> bytes:
    """Read payload up to the end, or up to a control capsule of this type."""
    got = bytearray()
    while not connection.exhausted:
        for event in await connection.read():
            if isinstance(event, Payload):
                got += event.data
            elif isinstance(event, Control) and until is not None and isinstance(parse_control(event), until):
                return bytes(got)
    return bytes(got)


async def send_and_end(stream: SocketStream, payload: bytes) -> None:
    await stream.send(payload)
    stream.shutdown_write()


async def digest_of(stream: SocketStream) -> str:
    digest = hashlib.sha256()
    while data := await stream.recv(1 << 18):
        digest.update(data)
    return digest.hexdigest()
