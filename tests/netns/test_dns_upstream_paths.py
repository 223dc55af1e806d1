"""From a resolver process to a real unbound on another host: link-local addresses, and addresses and routes that change."""

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from crossnet.lab.certificates import Authority
from tests.support.dns_packets import query
from tests.support.hosts import Namespace
from tests.support.running import Running
from tests.support.two_hosts import HERE, THERE, two_hosts
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.netns, pytest.mark.interop, pytest.mark.needs("netns", "ip", "nft", "unbound")]

FILE = """
network: a
discovery: mesh.yaml
admin: 127.0.0.1:0
drain: 0
dns: {{listen: "127.0.0.1:0", search: [], loop_probe: false, upstream: ["{upstream}"], {more}}}
"""
UNBOUND = """
server:
  interface: 0.0.0.0
  interface: ::0
  interface: 0.0.0.0@853
  interface: ::0@853
  interface-automatic: no
  access-control: 0.0.0.0/0 allow
  access-control: ::0/0 allow
  tls-service-key: "{key}"
  tls-service-pem: "{certificate}"
  username: ""
  chroot: ""
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  module-config: "iterator"
  local-zone: "test." redirect
  local-data: "test. 300 IN A 192.0.2.1"
remote-control:
  control-enable: no
"""
SCOPED = "fe80::2%here0"


def do(host: Namespace, *commands: str) -> None:
    """Run commands on a host."""
    with host.entered():
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True, timeout=10)


@contextlib.contextmanager
def unbound(host: Namespace, folder: Path) -> Iterator[None]:
    authority = Authority(folder)
    made = authority.server("dns", "a resolver", ("dns.example",))
    (folder / "unbound.conf").write_text(UNBOUND.format(key=made.key, certificate=made.certificate))
    with host.entered():
        process = subprocess.Popen(["unbound", "-d", "-c", str(folder / "unbound.conf")], stdin=subprocess.DEVNULL)
    try:
        with Asker(host, 53) as asker:
            wait_until(lambda: process.poll() is not None or asker.ask("up.test", limit_s=0.2) == 0, limit_s=20)
        assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


class Asker:
    """A client on the resolver's host."""

    def __init__(self, host: Namespace, port: int) -> None:
        with host.entered():
            self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.connect(("127.0.0.1", port))
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, name: str, *, limit_s: float = 5.0) -> int | None:
        """Ask for a name; return the response code, or None if there is no answer."""
        self.count += 1
        ident = self.count & 0xFFFF
        self.sock.settimeout(limit_s)
        try:
            self.sock.send(query(name, ident=ident))
            while True:
                reply = self.sock.recv(4096)
                if struct.unpack_from("!H", reply)[0] == ident:
                    return reply[3] & 15
        except OSError:
            return None

    def codes(self, count: int, tag: str) -> set[int | None]:
        """Ask for so many new names, one after the other."""
        return {self.ask(f"n{n}-{tag}.test") for n in range(count)}


@contextlib.contextmanager
def resolver(host: Namespace, folder: Path, upstream: str) -> Iterator[Asker]:
    (folder / "mesh.yaml").write_text("networks: [{id: a}]\n")
    more = "upstream_ca: ca.pem" if upstream.startswith("tls") else ""
    with host.entered():
        process = Running(folder, FILE.format(upstream=upstream, more=more))
    try:
        port = int(process.started()["dns"][0].rpartition(":")[2])
        with Asker(host, port) as asker:
            yield asker
    finally:
        process.kill()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Namespace, Namespace]]:
    """The resolver's host, and unbound's."""
    with two_hosts() as (here, there):
        do(here, "ip address add fe80::1/64 dev here0 nodad")
        do(there, "ip address add fe80::2/64 dev there0 nodad")
        with unbound(there, tmp_path):
            yield here, there


@pytest.mark.parametrize("upstream", [SCOPED, f"[{SCOPED}]:53", f"tcp://[{SCOPED}]", f"tls://[{SCOPED}]#dns.example"])
def test_a_link_local_name_server(hosts: tuple[Namespace, Namespace], tmp_path: Path, upstream: str) -> None:
    with resolver(hosts[0], tmp_path, upstream) as asker:
        assert asker.codes(20, "x") == {0}


WAYS = {"udp": THERE, "tcp": f"tcp://{THERE}", "tls": f"tls://{THERE}#dns.example"}


@pytest.mark.parametrize("upstream", WAYS.values(), ids=WAYS)
def test_another_address_in_place_of_the_first_costs_no_answer(
    hosts: tuple[Namespace, Namespace], tmp_path: Path, upstream: str
) -> None:
    here, _ = hosts
    with resolver(here, tmp_path, upstream) as asker:
        assert asker.codes(300, "before") == {0}
        for n in (3, 4):
            do(here, "ip address flush dev here0 scope global", f"ip address add 198.18.7.{n}/24 dev here0")
            assert asker.codes(100, f"after-{n}") == {0}


@pytest.mark.parametrize("upstream", WAYS.values(), ids=WAYS)
def test_another_source_beside_the_first_is_used(
    hosts: tuple[Namespace, Namespace], tmp_path: Path, upstream: str
) -> None:
    """The first address stays, but what is sent from it arrives nowhere, as behind a router that has another prefix now."""
    here, there = hosts
    with resolver(here, tmp_path, upstream) as asker:
        assert asker.codes(300, "before") == {0}
        do(
            here,
            "ip address add 198.18.7.3/24 dev here0",
            "ip route replace 198.18.7.0/24 dev here0 src 198.18.7.3",
        )
        do(
            there,
            "nft add table ip t",
            "nft add chain ip t in { type filter hook input priority 0; }",
            f"nft add rule ip t in ip saddr {HERE} drop",
        )
        assert asker.codes(100, "after") == {0}


@pytest.mark.parametrize("upstream", WAYS.values(), ids=WAYS)
def test_a_link_that_was_down_is_used_as_soon_as_it_is_up(
    hosts: tuple[Namespace, Namespace], tmp_path: Path, upstream: str
) -> None:
    here, _ = hosts
    with resolver(here, tmp_path, upstream) as asker:
        assert asker.codes(100, "before") == {0}
        do(here, "ip link set here0 down")
        assert 0 not in asker.codes(20, "down")
        do(here, "ip link set here0 up")
        wait_until(lambda: asker.ask(f"up{asker.count}.test") == 0, limit_s=20)
        assert asker.codes(50, "up") == {0}
