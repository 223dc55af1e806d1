"""Addresses of upstreams as text."""

from ipaddress import ip_address

import pytest

from dnsgw.upstream.address import BadUpstreamAddress, UpstreamAddress, UpstreamProtocol, parse_destination

GOOD = {
    "10.0.0.10": UpstreamAddress(ip_address("10.0.0.10"), 53),
    "10.0.0.10:5353": UpstreamAddress(ip_address("10.0.0.10"), 5353),
    "fd00::1": UpstreamAddress(ip_address("fd00::1"), 53),
    "[fd00::1]:5353": UpstreamAddress(ip_address("fd00::1"), 5353),
    "fe80::1%eth0": UpstreamAddress(ip_address("fe80::1%eth0"), 53),
    "[fe80::1%br-lan.5]:5353": UpstreamAddress(ip_address("fe80::1%br-lan.5"), 5353),
    "tls://[fe80::1%2]#dns.example": UpstreamAddress(ip_address("fe80::1%2"), 853, UpstreamProtocol.TLS, "dns.example"),
    "tcp://10.0.0.10": UpstreamAddress(ip_address("10.0.0.10"), 53, UpstreamProtocol.TCP),
    "tls://10.0.0.10": UpstreamAddress(ip_address("10.0.0.10"), 853, UpstreamProtocol.TLS),
    "tls://[fd00::1]:8853#dns.example": UpstreamAddress(
        ip_address("fd00::1"), 8853, UpstreamProtocol.TLS, "dns.example"
    ),
    "https://10.0.0.10/dns-query#dns.example": UpstreamAddress(
        ip_address("10.0.0.10"), 443, UpstreamProtocol.HTTPS, "dns.example", "/dns-query"
    ),
}


@pytest.mark.parametrize("text", GOOD)
def test_it_reads_and_shows_the_same(text: str) -> None:
    assert parse_destination(text) == GOOD[text]
    assert str(GOOD[text]) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dns.example",
        "10.0.0.256",
        "10.0.0.10:0",
        "10.0.0.10:65536",
        "10.0.0.10#name",
        "10.0.0.10/path",
        "https://10.0.0.10",
        "https://dns.example/dns-query",
        "tls://10.0.0.10/x",
        "quic://10.0.0.10",
        "tcp://10.0.0.10#name",
        "10.0.0.10 ",
        "[fd00::1",
        "fe80::1",
        "[fe80::1]:5353",
        "fe80::1%",
        "fe80::1%eth0/64",
        "fe80::1%" + "x" * 16,
        "10.0.0.10%eth0",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(BadUpstreamAddress):
        parse_destination(text)
