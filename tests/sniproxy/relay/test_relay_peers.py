"""Real clients and a real server through the relay: end-to-end handshakes, and readable error messages for refusals."""

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from tests.support.relays import DOMAIN, a_relay, name_of

pytestmark = [pytest.mark.anyio, pytest.mark.interop]


@dataclass
class Server:
    """A TLS server that answers each connection with what it saw of the handshake."""

    port: int
    ca: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(f"*.a.{DOMAIN}").configure_cert(context)
    names: dict[int, str | None] = {}
    context.sni_callback = lambda connection, name, _: names.__setitem__(id(connection), name)

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            plain.settimeout(10)
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    connection.recv(1000)
                    name = names.pop(id(connection), None)
                    body = f"{connection.version()} {name}\n".encode()
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                    connection.unwrap()
            except OSError:
                plain.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield Server(listener.getsockname()[1], folder / "ca.pem")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


async def run(*command: str, question: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a client to its end."""
    return await asyncio.to_thread(
        subprocess.run,
        command,
        input=question,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=20,
        check=False,
    )


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    "options",
    [[], ["-tls1_2"], ["-max_send_frag", "512", "-alpn", ",".join(["http/1.1"] * 60)]],
    ids=["TLS 1.3", "TLS 1.2", "a hello in records of 512"],
)
async def test_openssl_shakes_hands_through_the_relay(server: Server, options: list[str]) -> None:
    async with a_relay() as running:
        name = name_of(server.port)
        done = await run(
            "openssl",
            "s_client",
            "-quiet",
            "-verify_return_error",
            "-verify_hostname",
            name,
            "-CAfile",
            str(server.ca),
            "-connect",
            "{}:{}".format(*running.relay.addresses[0]),
            "-servername",
            name,
            *options,
            question=b"GET / HTTP/1.0\r\n\r\n",
        )
        assert f"TLSv1.{2 if '-tls1_2' in options else 3} {name}".encode() in done.stdout, done.stdout
        assert (await running.ended())[0]["reason"] == "ok"


@pytest.mark.needs("openssl")
async def test_openssl_says_unrecognized_name() -> None:
    async with a_relay() as running:
        where = "{}:{}".format(*running.relay.addresses[0])
        done = await run("openssl", "s_client", "-connect", where, "-servername", "stranger.example")
    assert done.returncode != 0
    assert b"unrecognized name" in done.stdout


@pytest.mark.needs("curl")
async def test_curl(server: Server) -> None:
    async with a_relay() as running:
        port = running.relay.addresses[0][1]

        async def ask(name: str) -> subprocess.CompletedProcess[bytes]:
            options = ["--silent", "--show-error", "--max-time", "10", "--cacert", str(server.ca)]
            return await run("curl", *options, "--connect-to", f"{name}:443:127.0.0.1:{port}", f"https://{name}/")

        served = await ask(name_of(server.port))
        refused = await ask("stranger.example")
    assert name_of(server.port).encode() in served.stdout
    assert refused.returncode == 35
    assert b"unrecognized name" in refused.stdout
