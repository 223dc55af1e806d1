"""Which addresses belong to this host, according to the real kernel."""

import errno
import ipaddress
import socket

import pytest

from sniproxy.engine.host_addresses import is_own_address

OWN = ["127.0.0.1", "127.8.9.10", "::1", "::", "0.0.0.0", "::ffff:127.0.0.1"]
NOT_OWN = [
    "192.0.2.1",
    "::ffff:192.0.2.1",
    "198.51.100.255",
    "2001:db8::1",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "ff02::1",
]


@pytest.mark.parametrize("address", OWN)
def test_own(address: str) -> None:
    assert is_own_address(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_OWN)
def test_not_own(address: str) -> None:
    assert not is_own_address(ipaddress.ip_address(address))


@pytest.mark.parametrize(("address", "own"), [(a, True) for a in OWN] + [(a, False) for a in NOT_OWN])
def test_a_sandbox_without_netlink(address: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make = socket.socket

    def without_netlink(family: int, *arguments: object) -> socket.socket:
        if family == socket.AF_NETLINK:
            raise PermissionError(errno.EPERM, "not in this sandbox")
        return make(family, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "socket", without_netlink)
    assert is_own_address(ipaddress.ip_address(address)) is own


def test_the_address_of_an_interface_is() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route to anywhere")
        address = probe.getsockname()[0]
    assert is_own_address(ipaddress.ip_address(address))
