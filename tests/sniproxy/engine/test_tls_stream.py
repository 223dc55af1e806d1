"""TLS streams against each other, against the openssl of the system, and against peers that misbehave."""

import asyncio
import fcntl
import os
import socket
import ssl
import struct
import subprocess
import termios
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trustme

from sniproxy.engine import Listener, SocketStream, StreamClosed, TlsStream, connect_tls
from sniproxy.engine.tls_stream import MAX_ENCRYPTED_AT_ONCE, MAX_RECORDS_AT_ONCE
from tests.support.streams import TLS_NAME, pair, read_all, shake, sockets, tls_contexts, until_reset

pytestmark = pytest.mark.anyio


@pytest.fixture
async def joined() -> AsyncIterator[tuple[SocketStream, SocketStream]]:
    client, server = await pair("tls")
    yield client, server
    client.close()
    server.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_half_close_with_bytes_on_their_way_both_ways(version: ssl.TLSVersion) -> None:
    contexts = tls_contexts()
    one, other = sockets()
    client = TlsStream(one, contexts[0], server_hostname=TLS_NAME)
    server = TlsStream(other, contexts[1], server_side=True)
    limited = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    limited.check_hostname, limited.verify_mode = False, ssl.CERT_NONE
    limited.maximum_version = version
    client = TlsStream(client._sock, limited, server_hostname=TLS_NAME)
    await shake(client, server)
    assert client.session.version() == version.name.replace("_", ".")
    await client.send(b"a question")
    await server.send(b"early answer, ")
    server_got = await server.recv_exactly(2)  # the rest of the record is decrypted and waits inside
    server.shutdown_write()
    assert await client.recv_exactly(5) == b"early"
    client.shutdown_write()
    assert server_got + await read_all(server) == b"a question"
    assert await read_all(client) == b" answer, "
    client.close()
    server.close()


async def test_payload_that_waits_survives_our_own_end(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    payload = os.urandom(300_000)
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(client.send(payload))
        first = await server.recv_exactly(1000)
        server.shutdown_write()
        assert await client.recv() == b""
        got = first
        while len(got) < len(payload):
            got += await server.recv(777)
        await sending
    assert got == payload
    client.shutdown_write()
    assert await server.recv() == b""
    assert await server.recv() == b""


async def test_what_is_read_at_once_is_decrypted(joined: tuple[SocketStream, SocketStream]) -> None:
    """Also data that waits in the socket, part of a record, and bytes that were given back."""
    client, server = joined
    assert server.try_recv() == b""
    await client.send(b"question")
    await server.readable()
    assert server.try_recv(3) == b"que"
    server.unread(b"abcd")
    assert (server.try_recv(2), server.try_recv(), server.try_recv()) == (b"ab", b"cd", b"stion")
    assert server.try_recv() == b""
    client.shutdown_write()
    assert await server.recv() == b""
    assert server.try_recv() == b""


async def test_what_was_given_back_goes_first(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    await client.send(b"abc", b"def")
    data = await server.recv_exactly(3)
    server.unread(data)
    server.shutdown_write()
    assert await server.recv_exactly(6) == b"abcdef"


async def test_sent_and_closed_at_once_arrives_whole(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    payload = os.urandom(5_000_000)

    async def send() -> None:
        await client.send(payload)
        client.close()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        assert await read_all(server) == payload


async def test_closed_with_payload_unread_is_a_reset(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    await client.send(b"not read")
    await server.readable()
    server.close()
    await until_reset(client)


async def test_a_fin_without_close_notify_is_a_cut(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    await client.send(b"half")
    client._sock.shutdown(socket.SHUT_WR)
    assert await server.recv_exactly(4) == b"half"
    await until_reset(server)


async def test_a_reset_stays_one(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    client.reset()
    await until_reset(server)
    with pytest.raises(StreamClosed):
        await client.send(b"x")
    with pytest.raises(StreamClosed):
        await client.recv()


async def test_bytes_that_are_not_tls_are_an_error(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    client._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(ssl.SSLError):
        await server.recv()


async def test_what_is_encrypted_ahead_of_the_socket_is_bounded(joined: tuple[SocketStream, SocketStream]) -> None:
    client, server = joined
    assert isinstance(client, TlsStream)
    sent = 0
    while taken := client.try_send((bytes(10 * MAX_ENCRYPTED_AT_ONCE),)):
        assert taken <= MAX_ENCRYPTED_AT_ONCE
        sent += taken
    assert len(client._queue) <= MAX_ENCRYPTED_AT_ONCE + 1024
    assert not await client.flushed(0.01)
    client.shutdown_write()  # its close_notify and FIN wait for what the socket has not taken
    with pytest.raises(BrokenPipeError):
        await client.send(b"behind the end")
    assert len(await read_all(server)) == sent


async def test_the_rest_is_sent_while_the_peer_reads(joined: tuple[SocketStream, SocketStream]) -> None:
    """What `try_send` took is sent without another call."""
    client, server = joined
    sent = 0
    while taken := client.try_send((bytes(1 << 16),)):
        sent += taken
    assert len(await server.recv_exactly(sent)) == sent


async def test_waiting_ends_when_our_side_closes(joined: tuple[SocketStream, SocketStream]) -> None:
    client, _ = joined
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(client.recv())
            await asyncio.sleep(0)
            client.close()
    assert caught.group_contains(StreamClosed)


class Server:
    """A TLS listener that answers each connection with what it read."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.errors: asyncio.Queue[str] = asyncio.Queue()

    async def handle(self, stream: SocketStream) -> None:
        assert isinstance(stream, TlsStream)
        try:
            await stream.handshake(0.3)
            await stream.send(await stream.recv())
            stream.shutdown_write()
        except (OSError, TimeoutError) as error:
            self.errors.put_nowait(type(error).__name__)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server(await Listener.open("127.0.0.1", 0, tls=tls_contexts()[1]))
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.listener.serve(server.handle))
        yield server
        serving.cancel()


async def test_a_listener_and_connect(server: Server) -> None:
    stream = await connect_tls(
        *server.listener.address, context=tls_contexts()[0], server_hostname=TLS_NAME, timeout_s=20
    )
    await stream.send(b"hello")
    assert await read_all(stream) == b"hello"
    stream.close()


@pytest.mark.parametrize(
    ("context", "name", "message"),
    [
        (None, TLS_NAME, "unable to get local issuer certificate|self.signed"),
        ("trusting", "other.example", "Hostname mismatch"),
        ("trusting", "127.0.0.1", "IP address mismatch"),
    ],
)
async def test_a_certificate_that_does_not_verify(server: Server, context: str | None, name: str, message: str) -> None:
    chosen = tls_contexts()[0] if context else ssl.create_default_context()
    with pytest.raises(ssl.SSLCertVerificationError, match=message):
        await connect_tls(*server.listener.address, context=chosen, server_hostname=name, timeout_s=20)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.0\r\n\r\n"])
async def test_a_client_without_a_handshake_is_dropped(server: Server, said: bytes) -> None:
    reader, writer = await asyncio.open_connection(*server.listener.address)
    writer.write(said)
    async with asyncio.timeout(20):
        assert await server.errors.get() == ("SSLError" if said.startswith(b"GET") else "TimeoutError")
    writer.close()
    del reader


async def test_a_server_without_a_handshake_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        await connect_tls(*silent.getsockname(), context=tls_contexts()[0], server_hostname=TLS_NAME, timeout_s=0.1)


async def test_a_server_that_hangs_up_in_the_handshake() -> None:
    async def hang_up(stream: SocketStream) -> None:
        await stream.recv()

    listener = await Listener.open("127.0.0.1", 0)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(hang_up))
        with pytest.raises(ConnectionResetError):
            await connect_tls(*listener.address, context=tls_contexts()[0], server_hostname=TLS_NAME, timeout_s=20)
        serving.cancel()


@pytest.mark.interop
@pytest.mark.needs("openssl")
async def test_openssl_speaks_with_us(server: Server) -> None:
    program = await asyncio.create_subprocess_exec(
        "openssl",
        *("s_client", "-connect", f"127.0.0.1:{server.listener.address[1]}", "-servername", TLS_NAME, "-quiet"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(20):
        output, _ = await program.communicate(b"from openssl\n")
    assert output == b"from openssl\n"


async def test_a_read_decrypts_a_limited_number_of_records(joined: tuple[SocketStream, SocketStream]) -> None:
    """A byte in each record costs us a hundred times what it costs the peer's network."""
    client, server = joined
    records = 4 * MAX_RECORDS_AT_ONCE
    for _ in range(records):
        await client.send(b"x")
    assert await client.flushed(5)
    sizes = []  # type: ignore[var-annotated]
    while sum(sizes) < records:
        sizes.append(len(await server.recv()))
    assert max(sizes) <= MAX_RECORDS_AT_ONCE


@pytest.mark.needs("openssl")
@pytest.mark.interop
async def test_new_keys_again_and_again_end_the_connection() -> None:
    """A TLS 1.3 peer may ask for new keys as often as it likes, and never send a byte of payload."""
    certificate = trustme.CA().issue_cert(TLS_NAME)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    listener = await Listener.open("127.0.0.1", 0, tls=context)
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def read(stream: SocketStream) -> None:
        assert isinstance(stream, TlsStream)
        await stream.handshake()
        try:
            while await stream.recv():
                pass
            ended.set_result(None)
        except OSError as error:
            ended.set_result(error)
        finally:
            stream.close()

    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(read))
        port = listener.address[1]
        client = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert client.stdin is not None
        try:
            # Each line "k" is a KeyUpdate of 27 bytes.
            writer = threading.Thread(target=_feed, args=(client, b"k\n", 5_000))
            writer.start()
            async with asyncio.timeout(30):
                error = await ended
            assert isinstance(error, ConnectionAbortedError), error
        finally:
            client.kill()
            client.wait()
            writer.join()
            with suppress(BrokenPipeError):  # what it did not read
                client.stdin.close()
            serving.cancel()


def _feed(program: subprocess.Popen[bytes], line: bytes, times: int) -> None:
    """Write lines one by one, each after the previous one was read, because the program only looks at the first byte of a read."""
    pipe = program.stdin
    assert pipe is not None
    with suppress(OSError):  # it has gone
        for _ in range(times):
            pipe.write(line)
            pipe.flush()
            while program.poll() is None and struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]:
                time.sleep(0)
