"""The host's own name servers, and which of them are this server."""

import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

from dnsgw.upstream.host_resolvers import Endpoint, leads_here, read_resolv_conf


def endpoint(address: str, port: int = 53) -> Endpoint:
    return ip_address(address), port


def test_resolv_conf_gives_three_name_servers_at_most(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text(
        "# nameserver 192.0.2.9\nsearch a.test\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 # here\nnameserver\n"
        "nameserver x.test\noptions ndots:5\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n"
    )
    assert read_resolv_conf(conf) == (endpoint("192.0.2.1"), endpoint("2001:db8::1"), endpoint("192.0.2.3"))


def test_a_link_local_name_server_keeps_its_interface(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver fe80::1%eth0\nnameserver fe80::1%2\n")
    assert read_resolv_conf(conf) == (endpoint("fe80::1%eth0"), endpoint("fe80::1%2"))
    assert [str(address) for address, _ in read_resolv_conf(conf)] == ["fe80::1%eth0", "fe80::1%2"]


def test_a_resolv_conf_that_cannot_be_read_has_none(tmp_path: Path) -> None:
    assert read_resolv_conf(tmp_path / "missing") == ()
    assert read_resolv_conf(tmp_path) == ()
    (tmp_path / "odd").write_bytes(b"\xff\xfenameserver 192.0.2.1\nnameserver 192.0.2.2\0\n")
    assert read_resolv_conf(tmp_path / "odd") == ()


@pytest.mark.parametrize(
    ("upstream", "listening", "loop"),
    [
        (endpoint("127.0.0.1"), endpoint("127.0.0.1"), True),
        (endpoint("127.0.0.1"), endpoint("127.0.0.2"), False),
        (endpoint("127.0.0.1", 5353), endpoint("127.0.0.1"), False),
        (endpoint("127.0.0.53"), endpoint("0.0.0.0"), True),
        (endpoint("0.0.0.0"), endpoint("127.0.0.1"), True),
        (endpoint("127.0.0.1"), endpoint("::"), False),
        (endpoint("::1"), endpoint("::"), True),
        (endpoint("192.0.2.1"), endpoint("0.0.0.0"), False),
        (endpoint("2001:db8::1"), endpoint("::"), False),
    ],
)
def test_an_upstream_that_is_ourselves(upstream: Endpoint, listening: Endpoint, loop: bool) -> None:
    assert leads_here(upstream, [endpoint("127.9.9.9", 1), listening]) is loop


def test_an_address_of_this_host_is_ourselves_behind_a_wildcard() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = probe.getsockname()[0]
    assert leads_here(endpoint(own), [endpoint("0.0.0.0")])
