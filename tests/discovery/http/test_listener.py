"""Connections of an HTTP server: limits, deadlines, and which one is closed at a limit. Real sockets on loopback."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme

from discovery.api.timing import ServerTiming
from discovery.http.listener import ListenerTiming
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

HALF = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
WHOLE = HALF + b"\r\n"
LIMIT_S = 10.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


_open: list[asyncio.StreamWriter] = []


@pytest.fixture(autouse=True)
async def closing() -> AsyncIterator[None]:
    """Close all connections."""
    yield
    while _open:
        writer = _open.pop()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def connect(at: Any, data: bytes = b"", address: str = "127.0.0.1") -> Streams:
    streams = await asyncio.open_connection("127.0.0.1", at.port, local_addr=(address, 0))
    _open.append(streams[1])
    streams[1].write(data)
    return streams


async def ended(streams: Streams) -> bytes:
    """Return the data up to the end of the connection. Fails if it stays open."""
    try:
        async with asyncio.timeout(LIMIT_S):
            return await streams[0].read()
    except ConnectionError:
        return b""
    finally:
        streams[1].close()


async def answered(streams: Streams) -> bool:
    async with asyncio.timeout(LIMIT_S):
        head = await streams[0].readuntil(b"\r\n\r\n")
        await streams[0].readuntil(b"\n")
    return head.startswith(b"HTTP/1.1 200")


def impatient(**timing: float) -> ServerTiming:
    return ServerTiming(connections=ListenerTiming(overdue_check_s=0.02, **timing))


def limits(at: Any, reason: str) -> float:
    return float(at.server._listening._ended.labels(reason)._value.get())


async def test_half_requests_of_one_address_displace_only_each_other(serve: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with serve(max_connections=20, max_connections_per_address=8) as at:
        kept = await connect(at, WHOLE, "127.0.0.9")
        assert await answered(kept)
        halves = [await connect(at, HALF, "127.0.0.2") for _ in range(100)]
        assert await answered(await connect(at, WHOLE, "127.0.0.3"))
        await eventually(lambda: limits(at, "address_full") >= 92)
        assert at.server._listening._count <= 8 + 2
        kept[1].write(WHOLE)
        assert await answered(kept), "who has asked properly stays"
        for streams in halves:
            streams[1].close()
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 4)


async def test_many_addresses_together_stay_below_the_total_limit(serve: Any) -> None:
    async with serve(max_connections=20, max_connections_per_address=8) as at:
        halves = [await connect(at, HALF, f"127.0.0.{2 + number % 50}") for number in range(100)]
        assert await answered(await connect(at, WHOLE))
        assert at.server._listening._count <= 20
        assert limits(at, "full") > 0
        for streams in halves:
            streams[1].close()


async def test_incomplete_requests_do_not_displace_watches(serve: Any) -> None:
    async with serve(max_connections=4, max_connections_per_address=4) as at, at.watch() as lines:
        assert (await anext(lines))["type"] == "reset"
        for _ in range(20):
            (await connect(at, HALF))[1].write(b"x")
        assert (await anext(lines))["type"] == "sync"
        assert await answered(await connect(at, WHOLE))


async def test_a_later_request_has_a_deadline_from_its_first_byte(serve: Any) -> None:
    async with serve(timing=impatient(header_s=0.3)) as at:
        streams = await connect(at, WHOLE)
        assert await answered(streams)
        assert await ended(await connect(at, HALF)) == b""  # streams has been idle for longer by now, which is allowed
        streams[1].write(WHOLE)
        assert await answered(streams)
        streams[1].write(HALF + b"X: ")
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(ended(streams))
            while not reading.done():  # a byte now and then does not extend the deadline
                streams[1].write(b"x")
                await asyncio.sleep(0.02)
        assert reading.result() == b""
        assert limits(at, "header_timeout") == 2


async def test_a_client_that_reads_no_answer_is_cut_off(serve: Any) -> None:
    async with serve(timing=impatient(write_s=0.2)) as at:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", at.port))
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(LIMIT_S):
                    while True:
                        await loop.sock_sendall(client, b"GET /page.css HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 50)
        assert limits(at, "write_timeout") == 1


async def test_an_endless_request_is_cut_off(serve: Any) -> None:
    async with serve(max_body_bytes=1000) as at:
        head = b"PUT /v1/records/relay/b/r HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await connect(at, head)
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(LIMIT_S):
                while True:
                    writer.write(b"2000\r\n" + bytes(0x2000) + b"\r\n")
                    await writer.drain()
        del reader


async def test_handshakes_count_and_have_a_deadline(serve: Any, tmp_path: Any) -> None:
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    limited = {"max_connections": 10, "max_connections_per_address": 10}
    async with serve(tls_cert=tmp_path / "server.pem", timing=impatient(handshake_s=0.2), **limited) as at:
        silent = [await connect(at, b"\x16\x03\x01") for _ in range(40)]
        await eventually(lambda: not at.server._listening._count and limits(at, "handshake"))
        for streams in silent:
            assert await ended(streams) == b""
