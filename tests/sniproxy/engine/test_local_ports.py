"""Local ports in a network namespace that has few of them."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sniproxy.engine import connect
from sniproxy.engine.local_ports import NoLocalPort, connect_error, local_ports, shortages, time_wait
from tests.support.hosts import Namespace

pytestmark = [pytest.mark.anyio, pytest.mark.needs("netns", "ip")]

PORTS = 4
SOURCE = "127.0.0.2"


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A host with so many local ports."""
    host = Namespace()
    try:
        with host.entered():
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"40000 {40000 + PORTS - 1}")
        yield host
    finally:
        host.close()


def listener(closing: ExitStack, port: int) -> socket.socket:
    return closing.enter_context(socket.create_server(("127.0.0.1", port)))


@pytest.mark.parametrize("source", [None, SOURCE])
async def test_each_destination_has_all_ports(host: Namespace, source: str | None) -> None:
    """Also from a source address of our choice."""
    count = shortages.count
    with ExitStack() as closing:
        for port in (1001, 1002):
            with host.entered():
                listener(closing, port)
                for _ in range(PORTS):
                    # Nothing else runs in this thread that should be in another namespace.
                    stream = await connect("127.0.0.1", port, timeout_s=5, local_address=source)
                    closing.callback(stream.close)
        assert shortages.count == count
        with host.entered(), pytest.raises(NoLocalPort, match=r"127\.0\.0\.1 port 1002"):
            await connect("127.0.0.1", 1002, timeout_s=5, local_address=source)
    assert shortages.count == count + 1


def test_the_kernel_tells_their_number_and_what_waits(host: Namespace) -> None:
    with ExitStack() as closing, host.entered():
        assert local_ports() == PORTS
        before = time_wait()
        server = listener(closing, 1001)
        client = closing.enter_context(socket.create_connection(server.getsockname()))
        accepted, _ = server.accept()
        client.close()
        assert accepted.recv(1) == b""
        accepted.close()
        assert time_wait() == before + 1


def test_no_address_to_connect_from_is_another_error(host: Namespace) -> None:
    with host.entered():
        subprocess.run(["ip", "-6", "address", "flush", "dev", "lo"], check=True, timeout=10)
        count = shortages.count
        with socket.socket(socket.AF_INET6) as sock:
            code = sock.connect_ex(("::1", 1001))
        error = connect_error(code, "::1", where=": here")
    assert code
    assert not isinstance(error, NoLocalPort)
    assert error.strerror is not None
    assert error.strerror.endswith(": here")
    assert shortages.count == count
