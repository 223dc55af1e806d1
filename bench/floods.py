"""The floods of bench.fair: each attacker sends the most expensive messages of a protocol as fast as the other side reads them.

An attacker has one connection at a time; if it is cut, it connects again after about a second. A worker of bench.fair:

    {"command": "flood", "what": "stun-bindings", "attackers": 64, …}      starts; `stop` ends it
"""

import asyncio
import contextlib
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any

from bench.exchange import UPLOAD, client_hello, request
from bench.worker import allow_open_files, serve_commands
from crossnet.config.sections import DEFAULT_DOMAIN
from sniproxy.engine import ByteStream, SocketStream, connect
from sniproxy.formats.client_hello import HelloReader
from sniproxy.transport.base import Candidate
from sniproxy.transport.direct import DIRECT
from sniproxy.transport.errors import DialError, ResetBeforeReady, StaleEpoch
from sniproxy.tunnel.capsules import CapsuleType, header
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.messages import Opened, Ping, Ready, Received
from sniproxy.tunnel.preamble import SigningKey
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest
from turnreg.stun.message import Message, MessageClass, Method

AGAIN_S = (0.5, 1.5)
"""Pause before an attacker that was cut connects again, at random in this range: bench.abuse measures connections in lockstep."""

CHUNK = 64 * 1024
HELD_S = 0.2
"""How long a hostile gateway reads before it answers: by then it has the preamble and the ClientHello."""

_BINDING = Message(Method.BINDING, MessageClass.REQUEST, bytes(12)).pack()
_INDICATION = Message(Method.BINDING, MessageClass.INDICATION, bytes(12)).pack()

CAPSULES = {
    "empty": header(CapsuleType.DATA, 0),
    "one-byte": header(CapsuleType.DATA, 1) + b"x",
    "unknown": b"\x21\x00",
    "received": Received(0).pack(),
    "ping": Ping(bytes(8)).pack(),
}


def _filled(piece: bytes) -> bytes:
    return piece * (CHUNK // len(piece))


def _pour(sock: socket.socket, data: bytes, stopped: Callable[[], bool]) -> None:
    """Send the same bytes repeatedly, and discard what arrives, until the connection is cut or `stopped`."""
    sock.setblocking(False)
    at = 0
    while not stopped():
        busy = True
        try:
            at = (at + sock.send(data[at:])) % len(data)
        except BlockingIOError:
            busy = False
        with contextlib.suppress(BlockingIOError):
            if not sock.recv(CHUNK):
                return
        if not busy:
            time.sleep(0.002)


def key_of(text: str, from_network: str, to_network: str) -> SigningKey:
    """Return the signing key with this secret in hexadecimal."""
    return SigningKey(
        id=f"{from_network}{to_network}-1",
        secret=bytes.fromhex(text),
        from_network=from_network,
        to_network=to_network,
    )


def opener(key: SigningKey) -> GatewayConnector:
    """Return a connector that opens streams as a relay of the key's network does."""
    keys = SigningKeys({key.id: key})
    return GatewayConnector(key.from_network, keys, now_ms=lambda: time.time_ns() // 1_000_000)


def call(name: str) -> StreamRequest:
    """Return the request for a stream of a client that sends only a ClientHello."""
    data = client_hello(name)
    reader = HelloReader()
    hello = reader.feed(data)
    assert hello is not None
    return StreamRequest(stream=os.urandom(16), client=("127.0.0.1", 1), local=("127.0.0.1", 2), hello=hello, data=data)


async def opened(relay: GatewayConnector, asked: StreamRequest, way: Candidate) -> CapsuleConnection:
    """Open a stream, twice if the gateway first reports its epoch. Raises what `GatewayConnector.open` and `dialled` raise."""
    try:
        return await relay.open(asked, way, 0, await dialled(way))
    except StaleEpoch:
        return await relay.open(asked, way, 1, await dialled(way))


async def warmed_up(relay: GatewayConnector, way: Candidate) -> CapsuleConnection:
    """Open a warm connection. Raises what `GatewayConnector.warm_up` and `dialled` raise."""
    try:
        return await relay.warm_up(way, await dialled(way))
    except StaleEpoch:
        return await relay.warm_up(way, await dialled(way))


async def dialled(way: Candidate) -> SocketStream:
    """Connect to a gateway. Raises OSError."""
    return await connect(way.address, way.port, timeout_s=5)


def candidate(network: str, gateway: str, address: tuple[str, int], target: str) -> Candidate:
    """Return the candidate of a gateway that is reached directly."""
    return Candidate(
        traits=DIRECT,
        network=network,
        target=target,
        address=address[0],
        port=address[1],
        addressee=gateway,
    )


def name_of(network: str, port: int) -> str:
    """Return the name of a service on loopback in that network."""
    return f"p{port}-127-0-0-1.{network}.{DEFAULT_DOMAIN}"


class Floods:
    """Attackers, one thread each: most of their time is spent in the kernel."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.cut = 0

    def flood(self, what: str, attackers: int, **more: Any) -> dict[str, Any]:
        """Start the attackers."""
        self._stop.clear()
        self.cut = 0
        kind, _, piece = what.partition("-")
        begins: dict[str, Callable[..., None]] = {
            "stun": self._stun,
            "tls": self._tls,
            "udp": self._udp,
            "relay": self._relay,
            "gateway": self._gateway,
            "warm": self._warm,
        }
        if kind == "relay":
            listener = socket.create_server(("127.0.0.1", more["gateway_port"]), backlog=256)
            self._spawn(self._gateways, listener, _filled(CAPSULES[piece]))
        for _ in range(attackers):
            self._spawn(self._again, begins[kind], piece, more)
        return {}

    def stop(self) -> dict[str, Any]:
        """Stop the attackers. The result has the number of connections that were cut."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()
        return {"cut": self.cut}

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _again(self, begin: Callable[..., None], piece: str, more: dict[str, Any]) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, EOFError, DialError, ResetBeforeReady):
                begin(piece, **more)
            self.cut += not self._stop.is_set()
            self._stop.wait(random.uniform(*AGAIN_S))

    def _stun(self, piece: str, *, turn: list[Any], **_: Any) -> None:
        with socket.create_connection(tuple(turn), timeout=5) as sock:
            _pour(sock, _filled(_INDICATION if piece == "indications" else _BINDING), self._stop.is_set)

    def _tls(self, _piece: str, *, turns: list[Any], **_: Any) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(tuple(turns), timeout=5) as raw, context.wrap_socket(raw) as sock:
            data = _filled(_BINDING)
            sock.settimeout(0.5)
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    sock.sendall(data)

    def _udp(self, _piece: str, *, udp: list[Any], **_: Any) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(tuple(udp))
            while not self._stop.is_set():
                for _burst in range(20):
                    with contextlib.suppress(OSError):
                        sock.send(_BINDING)
                time.sleep(0.0005)

    def _relay(self, _piece: str, *, relay: list[Any], **_: Any) -> None:
        """Act as a client whose stream leads to the hostile gateway."""
        with socket.create_connection(tuple(relay), timeout=5) as sock:
            sock.sendall(client_hello(name_of("h", 443)))
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(CHUNK):
                        return

    def _gateways(self, listener: socket.socket, data: bytes) -> None:
        """Act as the hostile gateway: send READY and OPENED on every connection, then the flood."""
        listener.settimeout(0.2)
        with listener:
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    sock, _ = listener.accept()
                    self._spawn(self._hostile, sock, data)

    def _hostile(self, sock: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(HELD_S)
            with contextlib.suppress(TimeoutError):
                while sock.recv(CHUNK):
                    pass
            opened = Opened(IPv4Address("127.0.0.1"), 443, 1)
            sock.setblocking(True)
            sock.sendall(Ready().pack() + opened.pack())
            _pour(sock, data, self._stop.is_set)

    def _gateway(self, piece: str, *, gateway: list[Any], key: str, service: int, **_: Any) -> None:
        """Act as a relay with a valid key: open a stream, then send the flood."""
        asyncio.run(self._framed(CAPSULES[piece], gateway, key, service, warm=False))

    def _warm(self, piece: str, *, gateway: list[Any], key: str, service: int, **_: Any) -> None:
        """Act as a relay with a valid key: open a warm connection, then send the flood."""
        asyncio.run(self._framed(CAPSULES[piece], gateway, key, service, warm=True))

    async def _framed(self, piece: bytes, gateway: list[Any], key: str, service: int, *, warm: bool) -> None:
        way = candidate("b", "gw-1", (gateway[0], gateway[1]), f"127.0.0.1:{service}")
        relay = opener(key_of(key, "a", "b"))
        connection = await warmed_up(relay, way) if warm else await opened(relay, call(name_of("b", service)), way)
        if not warm:
            await connection.send_data(request(UPLOAD))  # the service reads it without a limit
        sock = _taken(connection.stream)
        with sock:
            await asyncio.to_thread(_pour, sock, _filled(piece), self._stop.is_set)


def _taken(stream: ByteStream) -> socket.socket:
    """Return a socket of our own for the connection of a stream, and close the stream."""
    sock = socket.socket(fileno=os.dup(stream.fd))
    stream.close()
    return sock


def main() -> None:
    """Serve commands until standard input ends."""
    allow_open_files()
    floods = Floods()
    serve_commands({"flood": floods.flood, "stop": floods.stop})
    os._exit(0)  # do not wait for threads that are blocked on a dead process


if __name__ == "__main__":
    main()
