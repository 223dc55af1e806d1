"""Names that are not forwarded, and exceptions that are."""

from ipaddress import ip_network

import pytest

from dnsgw.mesh_zone.local_zones import NOWHERE, Found, LocallyServedZones, reverse_zones
from dnsgw.message.question import scan
from tests.support.dns_packets import query


def find(absent: LocallyServedZones, name: str) -> Found | None:
    return absent.find(scan(query(name)))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("printer.local", (8, False)),
        ("A.Printer.LOCAL", (10, False)),
        ("local", (0, True)),  # cluster.local lies below
        ("cluster.local", None),
        ("orders.shop.svc.cluster.local", None),
        ("orders.shop.svc.clusterset.local", None),  # another implementation of KEP-1645 may be upstream
        ("xcluster.local", (9, False)),
        ("nonlocal", None),
        ("local.example.test", None),
        ("1.0.0.127.in-addr.arpa", (6, False)),
        ("0.127.in-addr.arpa", (2, True)),
        ("127.in-addr.arpa", (0, True)),
        ("255.255.255.255.in-addr.arpa", (0, False)),
        ("5.1.254.169.in-addr.arpa", (4, False)),
        ("5.1.255.169.in-addr.arpa", None),
        ("1.0.0.10.in-addr.arpa", None),  # a cluster's own DNS has names for these
        ("1.0.16.172.in-addr.arpa", None),
        ("1.1.168.192.in-addr.arpa", None),
        ("1." + "0." * 31 + "ip6.arpa", (0, False)),
        ("1." + "0." * 28 + "0.d.f.ip6.arpa", None),
        ("1." + "0." * 28 + "a.e.f.ip6.arpa", (58, False)),
        ("home.arpa", None),
        ("x.internal", None),
        ("x.test", None),
        ("use-application-dns.net", None),
        ("mask.icloud.com", None),
        ("", None),
    ],
)
def test_what_is_not_asked_for_unless_told_otherwise(name: str, found: tuple[int, bool] | None) -> None:
    assert find(LocallyServedZones(), name) == found


def test_more_of_it() -> None:
    absent = LocallyServedZones(["use-application-dns.net", ip_network("10.0.0.0/8"), ip_network("172.16.0.0/12")])
    assert find(absent, "use-application-dns.net") == (0, False)
    assert find(absent, "x.use-application-dns.net") == (2, False)
    assert find(absent, "xuse-application-dns.net") is None
    assert find(absent, "4.3.2.10.in-addr.arpa") == (6, False)
    assert find(absent, "2.10.in-addr.arpa") == (2, True)
    assert find(absent, "4.3.31.172.in-addr.arpa") == (4, False)
    assert find(absent, "4.3.32.172.in-addr.arpa") is None
    assert find(absent, "printer.local") == (8, False)


def test_zones_in_forward_are_forwarded() -> None:
    absent = LocallyServedZones(["corp.example"], ["ad.corp.local", "4.254.169.in-addr.arpa", "lab.corp.example"])
    assert find(absent, "dc.ad.corp.local") is None
    assert find(absent, "corp.local") == (5, True)  # or a cache would take it that ad.corp.local is not there
    assert find(absent, "x.corp.local") == (7, False)
    assert find(absent, "5.4.254.169.in-addr.arpa") is None
    assert find(absent, "5.5.254.169.in-addr.arpa") == (4, False)
    assert find(absent, "x.lab.corp.example") is None
    assert find(absent, "corp.example") == (0, True)
    assert find(absent, "x.corp.example") == (2, False)


def test_search_domains_are_forwarded_unless_configured_otherwise() -> None:
    searched = ["shop.svc.k8s.local", "svc.k8s.local", "k8s.local", "corp.example", "office.example"]
    absent = LocallyServedZones(["corp.example"], ["lab.office.example"], searched)
    assert find(absent, "orders.shop.svc.k8s.local") is None
    assert find(absent, "x.k8s.local") is None
    assert find(absent, "xk8s.local") == (5, False)
    assert find(absent, "local") == (0, True)
    assert find(absent, "x.corp.example") == (2, False)
    assert find(absent, "x.office.example") is None
    assert find(LocallyServedZones((), (), ["local"]), "printer.local") is None


@pytest.mark.parametrize(
    "text", [*map(str, NOWHERE), "172.16.0.0/12", "10.0.0.0/9", "0.0.0.0/0", "fc00::/7", "10.1.2.3/32"]
)
def test_reverse_zones_hold_the_names_of_the_network_and_no_others(text: str) -> None:
    network = ip_network(text)
    zones = ["." + zone for zone in reverse_zones(network)]
    assert len(set(zones)) == len(zones)
    first, last = int(network[0]), int(network[-1])
    most = (1 << network.max_prefixlen) - 1
    for number, inside in [(first, True), (last, True), (first - 1, False), (last + 1, False)]:
        if 0 <= number <= most:
            name = "." + type(network[0])(number).reverse_pointer
            assert sum(name.endswith(zone) for zone in zones) == inside
