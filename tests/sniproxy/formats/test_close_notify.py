"""What a close_notify looks like from outside, by what OpenSSL writes, and that clients which leave it unread end streams well."""

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from sniproxy.engine.copy import TAIL_BYTES
from sniproxy.formats.close_notify import is_close_notify
from tests.support.path import a_path, name_of
from tests.support.streams import tls_contexts


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return tls_contexts()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("body", [0, 2, 5, 1000])
def test_of_openssl(contexts: tuple[ssl.SSLContext, ssl.SSLContext], version: ssl.TLSVersion, body: int) -> None:
    _, server_context = contexts
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    client = context.wrap_bio(to_client, to_server)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    to_client.read()
    if body:
        server.write(bytes(body))
    written = to_client.read()
    assert not is_close_notify(written[-TAIL_BYTES:], len(written)) or (body == 2 and version == ssl.TLSVersion.TLSv1_3)
    try:
        server.unwrap()
    except ssl.SSLWantReadError:
        pass
    alert = to_client.read()
    assert is_close_notify(alert, len(alert))
    assert is_close_notify(b"", len(alert)), "spliced, so that only its size is known"
    assert is_close_notify((written + alert)[-TAIL_BYTES:], len(written + alert))
    assert not is_close_notify((alert + b"x")[-TAIL_BYTES:], len(alert) + 1)


class Service:
    """A TLS service that answers with a body, sends close_notify, and waits for the client's, as most do."""

    def __init__(self, context: ssl.SSLContext, body: bytes) -> None:
        self._context, self._body = context, body
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.said_end = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        plain, _ = self._listener.accept()
        plain.settimeout(10)
        try:
            with self._context.wrap_socket(plain, server_side=True) as connection:
                connection.recv(1000)
                connection.sendall(self._body)
                if self._body[:1] == b"e":
                    connection.setblocking(False)
                    try:
                        connection.unwrap()
                    except ssl.SSLWantReadError:
                        pass
                    connection.setblocking(True)
                    self.said_end.set()
                connection.recv(1000)
        except OSError:
            plain.close()

    def close(self) -> None:
        self._listener.close()
        self._thread.join(20)


@pytest.fixture
def services(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[Callable[[bytes], Service]]:
    made: list[Service] = []

    def make(body: bytes) -> Service:
        made.append(Service(contexts[1], body))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["direct", "embedded"])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(b"ended", ("ok", "ok"), id="after close_notify"),
        pytest.param(b"going on", ("client_reset", "truncated"), id="in the middle"),
    ],
)
async def test_a_client_that_closes_without_reading(
    services: Callable[[bytes], Service], kind: str, body: bytes, expected: tuple[str, str]
) -> None:
    """It resets the connection. After the service's close_notify that is the end, before it is a cut."""
    service = services(body)
    async with a_path(kind) as path:
        name, (host, port) = name_of(service.port), path.relay.addresses[0]

        def visit() -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(socket.create_connection((host, port), 10), server_hostname=name) as client:
                client.sendall(b"question")
                got = b""
                while len(got) < len(body):
                    got += client.recv(1000)
                if body == b"ended":
                    assert service.said_end.wait(10)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 10, 0))
                    peeked = socket.socket(fileno=client.fileno())
                    try:
                        assert peeked.recv(1, socket.MSG_PEEK)
                    finally:
                        peeked.detach()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        await asyncio.to_thread(visit)
        relay, gateway = await path.ended()
    assert (relay[0]["reason"], gateway[0]["reason"]) == expected
