"""Services that need the client's address: they get it in a PROXY header, through the whole path."""

import asyncio
from pathlib import Path
from typing import Literal

import pytest

from crossnet.lab.certificates import Authority
from discovery.model.mesh import Kind, ServiceSpec
from tests.support.fixed_discovery import record
from tests.support.path import DOMAIN, a_path
from tests.support.running import curl, running
from tests.support.webservers import WEBSERVERS, webserver

pytestmark = pytest.mark.interop

CLIENT = "127.0.0.77"  # no other part of the path has this address


@pytest.mark.anyio
@pytest.mark.needs("turnserver", "curl")
@pytest.mark.parametrize("kind", WEBSERVERS)
async def test_a_real_client_is_seen_by_a_real_service(tmp_path: Path, kind: str) -> None:
    authority = Authority(tmp_path)
    certificate = authority.server("service", "the service", [f"*.shop.b.{DOMAIN}"])
    asked: tuple[bool | Literal["v1", "v2"], ...] = ("v1", "v2", True)
    with webserver(kind, tmp_path / kind, certificate) as port:
        async with a_path("coturn") as path:
            for number, header in enumerate(asked):
                name = f"s{number}.shop"
                spec = ServiceSpec(name=name, ports={"8443": [f"127.0.0.1:{port}"]}, proxy_protocol=header)
                path.discovery.put(record(Kind.SERVICE, "b", name, spec))
                host = f"p8443-{name}.b.{DOMAIN}"
                relay = "{}:{}".format(*path.relay.addresses[0])
                trust = ("--cacert", str(authority.path), "--interface", CLIENT, "--write-out", "%{local_port}")
                done = await asyncio.to_thread(curl, host, relay, *trust)
                assert done.returncode == 0, done.stderr
                seen, client_port = done.stdout.split("\n")
                assert seen == f"{CLIENT} {client_port} 127.0.0.1"


RELAY = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
import: [{{names: ["*.shop.example"], from: [a]}}]
relay: {{id: relay-1, listen: "127.0.0.1:0", deliver: ["127.0.0.1/32:{port}"]}}
"""
MESH = """
networks: [{{id: a}}]
services:
- {{name: s1.shop.example, network: a, ports: {{443: ["127.0.0.1:{port}"]}}, proxy_protocol: v1}}
- {{name: s2.shop.example, network: a, ports: {{443: ["127.0.0.1:{port}"]}}, proxy_protocol: true}}
"""


@pytest.mark.needs("curl")
@pytest.mark.parametrize("kind", WEBSERVERS)
def test_a_service_of_the_relays_own_network_sees_its_client_too(tmp_path: Path, kind: str) -> None:
    """On the local route the relay writes the header, since there is no gateway."""
    authority = Authority(tmp_path)
    certificate = authority.server("service", "the service", ["*.shop.example"])
    with webserver(kind, tmp_path / kind, certificate) as port:
        (tmp_path / "mesh.yaml").write_text(MESH.format(port=port))
        with running(tmp_path, RELAY.format(port=port)) as relay:
            at = relay.started()["relay"][0]
            trust = ("--cacert", str(authority.path), "--interface", CLIENT, "--write-out", "%{local_port}")
            for name in ("s1.shop.example", "s2.shop.example"):
                done = curl(name, at, *trust)
                assert done.returncode == 0, done.stderr
                seen, client_port = done.stdout.split("\n")
                assert seen == f"{CLIENT} {client_port} 127.0.0.1"
            assert relay.end() == 143
            assert {event["route"] for event in relay.events("stream")} == {"local"}
