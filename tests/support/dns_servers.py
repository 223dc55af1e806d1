"""A server on loopback, and minimal clients for it."""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from discovery.model.mesh import Mesh
from dnsgw import DnsConfig, DnsServer
from tests.support.dns_meshes import DOMAIN


@contextlib.asynccontextmanager
async def running(
    mesh: Mesh | None, *upstream_ports: int, listen: tuple[str, ...] = ("127.0.0.1",), **config: Any
) -> AsyncIterator[DnsServer]:
    """Run a server on free ports with this mesh, if any, and upstreams on these ports of loopback."""
    made_with = {
        key: config.pop(key) for key in ("claim", "timing", "resolv_conf_port", "udp_batches") if key in config
    }
    asked: dict[str, Any] = {"resolv_conf": Path("/nonexistent")}
    if upstream_ports:
        asked = {"upstream": tuple((ip_address("127.0.0.1"), port) for port in upstream_ports)}
    server = DnsServer(
        DnsConfig(
            network="a",
            domain=DOMAIN,
            loop_probe=config.pop("loop_probe", False),
            listen=tuple((ip_address(address), 0) for address in listen),
            **asked | config,
        ),
        **made_with,
    )
    await server.open()
    if mesh is not None:
        server.apply(mesh)
    try:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.run())
            await server.started.wait()
            try:
                yield server
            finally:
                await server.close()
                await serving
    finally:
        await server.close()


def free_port() -> int:
    """A port that UDP and TCP can be bound to on every address, below those that the kernel gives to clients."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            try:
                tcp.bind(("0.0.0.0", port))
                udp.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def address(server: DnsServer, index: int = 0) -> tuple[str, int]:
    host, port = server.addresses[index]
    return str(host), port


class Client:
    """A UDP client with a connected socket."""

    def __init__(self, destination: tuple[str, int], source: str | None = None) -> None:
        family = socket.AF_INET6 if ":" in destination[0] else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        if source is not None:
            self.sock.bind((source, 0))
        self.sock.connect(destination)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, packet: bytes) -> None:
        self.sock.send(packet)

    async def receive(self) -> bytes:
        async with asyncio.timeout(5):
            return await asyncio.get_running_loop().sock_recv(self.sock, 65535)

    async def ask(self, packet: bytes) -> bytes:
        self.send(packet)
        return await self.receive()


class Connection:
    """A TCP client with one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *packets: bytes) -> None:
        self.writer.write(b"".join(len(packet).to_bytes(2, "big") + packet for packet in packets))

    async def receive(self) -> bytes:
        async with asyncio.timeout(5):
            size = int.from_bytes(await self.reader.readexactly(2), "big")
            return await self.reader.readexactly(size)

    async def ask(self, packet: bytes) -> bytes:
        self.send(packet)
        return await self.receive()

    async def ended(self) -> bytes:
        """Read until the server closes the connection."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


@contextlib.asynccontextmanager
async def connected(server: DnsServer) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(*address(server))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
