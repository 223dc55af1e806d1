"""What is this host's own."""

import socket

import pytest

from turnreg.server.ownaddresses import is_own_address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is(address: str) -> None:
    assert is_own_address(address)


def test_the_address_of_an_interface_is() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route to anywhere")
        address = probe.getsockname()[0]
    assert is_own_address(address)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_others_are_not(address: str) -> None:
    assert not is_own_address(address)
