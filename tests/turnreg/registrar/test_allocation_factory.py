"""TLS to TURN servers: certificate verification, and one resumed session for all streams of a server."""

import asyncio
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from sniproxy.engine import TlsStream
from tests.support.coturn import Coturn
from tests.support.embedded_turn import embedded
from tests.support.registered import ID, registrar, relay, turn
from tests.support.turn_servers import COTURN, RunningServer
from tests.support.waiting import eventually
from turnreg.client.allocation import Timing
from turnreg.registrar.allocation_factory import dialler, parsed

pytestmark = pytest.mark.anyio

RELAYS = relay({"turn-1": ["127.0.0.1"]})


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca(authority: trustme.CA) -> str:
    return authority.cert_pem.bytes().decode()


@pytest.fixture(params=["embedded", COTURN])
def tls_server(request: pytest.FixtureRequest, authority: trustme.CA, tmp_path: Path) -> Iterator[RunningServer]:
    """A server whose certificate is for 127.0.0.1 and turn.example."""
    pem = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1", "turn.example").private_key_and_cert_chain_pem.write_to_path(str(pem))
    if request.param == "embedded":
        with embedded(listen_tls=(("127.0.0.1", 0),), tls_cert=pem, tls_key=pem) as ours:
            yield RunningServer(*ours.tls)
        return
    stock = Coturn(certificate=pem)
    try:
        stock.start()
        yield RunningServer(stock.address, stock.port)
    finally:
        stock.close()


async def test_control_and_data_over_tls(tls_server: RunningServer, ca: str) -> None:
    here = turn(tls_server, url=f"turns:127.0.0.1:{tls_server.port}?transport=tcp")
    async with registrar(here, RELAYS, ca={"a": ca}) as ours:
        spec = await ours.publishes(ID)
        payload = bytes(range(256)) * 2000
        reader, writer = await asyncio.open_connection("127.0.0.1", spec.port)
        writer.write(payload[:1000])
        async with asyncio.timeout(10):
            bound = await ours.streams.get()
            writer.write(payload[1000:])  # not before: coturn drops what outgrows its buffers before the bind
            assert not bound.stream.spliceable
            assert await bound.stream.recv_exactly(len(payload)) == payload
            await bound.stream.send(payload)
            assert await reader.readexactly(len(payload)) == payload
        bound.stream.close()
        writer.close()


@pytest.mark.needs("turnserver")
@pytest.mark.interop
@pytest.mark.parametrize("end", ["close", "reset"])
async def test_streams_through_coturn_resume_one_session(
    authority: trustme.CA, ca: str, tmp_path: Path, end: str
) -> None:
    """Each resumed handshake saves a round trip. A restarted server no longer has the session, and there is a full handshake.

    A gateway resets the connection of a stream that is done, and OpenSSL forgets sessions of connections that end in a fault.
    """
    pem = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    stock = Coturn(certificate=pem)
    dial = dialler(parsed(f"turns:127.0.0.1:{stock.port}?transport=tcp"), ca)
    try:
        for _ in range(2):
            await asyncio.to_thread(stock.start)
            resumed = []
            for _ in range(3):
                stream = await dial(stock.address, stock.port, timeout_s=10)
                assert isinstance(stream, TlsStream)
                resumed.append(stream.session.session_reused)
                getattr(stream, end)()
            assert resumed == [False, True, True]
            stock.stop()
    finally:
        stock.close()


async def test_a_failed_handshake_drops_the_session(tls_server: RunningServer, ca: str) -> None:
    dial = dialler(parsed(f"turns:127.0.0.1:{tls_server.port}?transport=tcp"), ca)
    streams = [await dial("127.0.0.1", tls_server.port, timeout_s=10)]
    with socket.create_server(("127.0.0.1", 0)) as rude:

        def answer() -> None:
            connection, _ = rude.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(answer))
            with pytest.raises(ssl.SSLError):
                await dial(*rude.getsockname(), timeout_s=10)
    streams.append(await dial("127.0.0.1", tls_server.port, timeout_s=10))
    for stream in streams:
        assert isinstance(stream, TlsStream)
        assert not stream.session.session_reused
        stream.close()


async def test_a_certificate_that_does_not_verify_is_refused(tls_server: RunningServer, ca: str) -> None:
    port = tls_server.port
    for url, trusted in (
        (f"turns:127.0.0.1:{port}?transport=tcp", None),  # by the system's authorities
        (f"turns:localhost:{port}?transport=tcp", ca),  # it is not for that name
    ):
        async with registrar(turn(tls_server, url=url), ca={"a": trusted} if trusted else {}) as ours:
            await ours.counts("registrations_total", reason="tls_failed")
            assert "CERTIFICATE_VERIFY_FAILED" in ours.of()["last_error"]["detail"]
            assert ours.count("registrations_total", reason="ok") == 0


@pytest.mark.parametrize("pem", ["", "nothing of the kind"])
async def test_an_invalid_ca_file(pem: str) -> None:
    here = turn(RunningServer("127.0.0.1", 1), url="turns:127.0.0.1:1?transport=tcp")
    async with registrar(here, ca={"a": pem}) as ours:
        await ours.counts("registrations_total", reason="tls_failed")
        assert "the CA file" in ours.of()["last_error"]["detail"]


async def test_tls_to_a_server_without_tls() -> None:
    with embedded() as server:
        here = turn(RunningServer("127.0.0.1", server.port), url=f"turns:127.0.0.1:{server.port}?transport=tcp")
        async with registrar(here, timing=Timing(connect_s=1)) as ours:
            reasons = ("tls_failed", "connect_failed")
            await eventually(lambda: sum(ours.count("registrations_total", reason=reason) for reason in reasons))
            assert not ours.discovery.published
