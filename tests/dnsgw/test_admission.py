"""Who may ask, and how much."""

from ipaddress import ip_address, ip_network

import pytest

from dnsgw import admission
from dnsgw.admission import DENIED, Clients, packed

TEN = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize("text", ["10.1.2.3", "fd00::1"])
def test_a_friend_has_its_share_of_every_second(text: str) -> None:
    clients = Clients(TEN, 5)
    assert clients.limited
    for host in (packed(text), ip_address(text).packed):
        assert clients.admit(host) == 5
        clients.left[host] = 0
        clients.renew()
        assert host not in clients.left
        assert clients.admit(host) == 5


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1%eth0"])
def test_a_stranger_has_nothing(host: str) -> None:
    clients = Clients(TEN, 0)
    assert not clients.limited
    assert clients.admit(packed(host)) == DENIED


def test_so_many_addresses_do_not_make_it_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_KNOWN", 100)
    clients = Clients(TEN, 5)
    for n in range(1000):
        clients.admit(ip_address(0x0A000000 + n).packed)
        assert len(clients.left) <= 100
