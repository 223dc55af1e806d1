"""A relay alone with a static mesh file, between real clients and real TLS services."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossnet.lab import service
from crossnet.lab.certificates import Authority
from tests.support.processes import Part
from tests.support.running import curl, free_port, running
from tests.support.waiting import LIMIT_S, listens, wait_until

pytestmark = pytest.mark.interop

NAME = "orders.shop.svc.cluster.local"
RELAY = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
import: [{{names: [{name}], from: [a]}}]
relay: {{id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.1/32:{port}"]}}
"""
MESH = """
networks: [{{id: a}}]
services: [{{name: {name}, network: a, ports: {{443: ["127.0.0.1:{port}"]}}}}]
"""


@contextlib.contextmanager
def served(kind: str, folder: Path) -> Iterator[int]:
    """Run a real service with mutual TLS while the block runs. Yields its port."""
    authority = Authority(folder)
    certificate = authority.server("service", "the service", [NAME, "*.a.svc.mesh.internal"])
    authority.client("client", "a client")
    port = free_port()
    program = Part("service", service.command(kind, "127.0.0.1", port, certificate, authority.path, folder), folder)
    try:
        program.start()
        wait_until(lambda: listens("127.0.0.1", port), what="the service listens", details=program.tail)
        yield port
    finally:
        program.kill()


@pytest.mark.needs("curl", "openssl")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("nginx", marks=pytest.mark.needs("nginx")),
        pytest.param("openssl", marks=pytest.mark.needs("openssl")),
    ],
)
def test_a_relay_alone_carries_mutual_tls_to_a_real_service(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    with served(kind, folder) as port:
        (tmp_path / "mesh.yaml").write_text(MESH.format(name=NAME, port=port))
        with running(tmp_path, RELAY.format(name=NAME, port=port)) as relay:
            at = relay.started()["relay"][0]
            trust = ["--cacert", f"{folder}/ca.pem", "--cert", f"{folder}/client.pem", "--key", f"{folder}/client.key"]
            for name in (NAME, f"p{port}-127-0-0-1.a.svc.mesh.internal"):
                done = curl(name, at, *trust)
                assert done.returncode == 0, done.stderr
                seen = service.seen(done.stdout)
                assert seen is not None
                assert seen.subject == "CN=a client"
            assert service.seen(curl(NAME, at, *trust[:2]).stdout) is None, "a client without a certificate is refused"
            assert s_client(NAME, at, folder) == seen
            assert relay.end() == 143
        streams = relay.events("stream")
    assert len(streams) == 4
    assert {event["route"] for event in streams} == {"local"}
    assert {event["target"] for event in streams} == {f"127.0.0.1:{port}"}


def s_client(name: str, at: str, folder: Path) -> service.Seen | None:
    """Connect with openssl s_client, with verification on both sides. Returns the certificate that the service saw."""
    files = ["-CAfile", f"{folder}/ca.pem", "-cert", f"{folder}/client.pem", "-key", f"{folder}/client.key"]
    command = ["openssl", "s_client", "-quiet", "-connect", at, "-servername", name, "-verify_hostname", name]
    done = subprocess.run(
        [*command, "-verify_return_error", *files],
        input=f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return service.seen(done.stdout)
