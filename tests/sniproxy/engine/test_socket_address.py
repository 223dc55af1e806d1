"""Addresses as the socket calls take them."""

import errno
import socket
from ipaddress import ip_address

import pytest

from sniproxy.engine.socket_address import scope_of, socket_address

LOOPBACK = socket.if_nametoindex("lo")


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "fe80::1"])
def test_an_address_without_a_zone(address: str) -> None:
    assert socket_address(address, 53) == socket_address(ip_address(address), 53) == (address, 53)


@pytest.mark.parametrize("zone", ["lo", str(LOOPBACK)])
def test_a_zone_is_an_interface_by_name_or_index(zone: str) -> None:
    for address in (f"fe80::1%{zone}", ip_address(f"fe80::1%{zone}")):
        assert socket_address(address, 53) == ("fe80::1", 53, 0, LOOPBACK)


@pytest.mark.parametrize("zone", ["nosuch", "\0", "", "x" * 99])
def test_an_interface_that_is_not_there(zone: str) -> None:
    with pytest.raises(OSError, match="no such interface") as caught:
        scope_of(zone)
    assert caught.value.errno == errno.ENODEV


def test_the_kernel_takes_it() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        assert sock.connect_ex(("fe80::1", 9)) == errno.EINVAL
        assert sock.connect_ex(socket_address("fe80::1%lo", 9)) != errno.EINVAL
