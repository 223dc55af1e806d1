"""Access list and rate limit."""

from ipaddress import ip_address, ip_network

import pytest

from dnsgw.client_limits import DENIED, Clients, packed

TEN = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize("text", ["10.1.2.3", "fd00::1"])
def test_a_friend_has_its_share_of_every_second(text: str) -> None:
    clients = Clients(TEN, 5)
    assert clients.limited
    for host in (packed(text), ip_address(text).packed):
        client, left = clients.admit(host)
        assert left == 5
        clients.left[client] = 0
        assert clients.admit(host) == (client, 0)
        clients.renew()
        assert not clients.left
        assert clients.admit(host) == (client, 5)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1%eth0"])
def test_a_stranger_has_nothing(host: str) -> None:
    clients = Clients(TEN, 0)
    assert not clients.limited
    assert clients.admit(packed(host)) == (packed(host), DENIED)


def test_ipv6_counts_by_64_bits_and_is_allowed_by_address() -> None:
    clients = Clients((ip_network("fd00::1/128"), ip_network("fd00::2/128"), ip_network("fd00:0:0:1::/64")), 5)
    (one, _), (two, _), (far, _) = (clients.admit(packed(text)) for text in ("fd00::1", "fd00::2", "fd00:0:0:1::1"))
    assert one == two != far
    clients.left[one] = 3
    assert clients.admit(packed("fd00::2")) == (two, 3)
    assert clients.admit(packed("fd00:0:0:1::ffff")) == (far, 5)
    assert clients.admit(packed("fd00::3"))[1] == DENIED  # although it shares the first 64 bits with allowed ones
    assert clients.admit(packed("fd00::1")) == (one, 3)


def test_without_a_limit_every_address_has_its_own_entry() -> None:
    clients = Clients(TEN, 0)
    for text in ("fd00::1", "fd00::2", "10.0.0.1"):
        assert clients.admit(packed(text))[0] == packed(text) in clients.left


def test_many_addresses_do_not_make_it_grow() -> None:
    clients = Clients(TEN, 5, max_known=100)
    for n in range(1000):
        clients.admit(ip_address(0x0A000000 + n).packed)
        assert len(clients.left) <= 100
