"""Addresses: endpoints, target lists, and refused ranges in every representation."""

from ipaddress import IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.addresses import (
    BadAddress,
    TargetList,
    TurnUrl,
    format_endpoint,
    parse_address,
    parse_cidrs,
    parse_endpoint,
    parse_port,
    parse_turn_url,
    refusal,
    spellings,
)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_endpoints_round_trip(address, port) -> None:  # type: ignore[no-untyped-def]
    assert parse_endpoint(format_endpoint(address, port)) == (address, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "10.1.0.5",
        "10.1.0.5:",
        "10.1.0.5:0",
        "10.1.0.5:08",
        "10.1.0.5:65536",
        "10.1.0.5:٣",
        "10.1.0.05:1",
        "fd00::5:443",
        "[fd00::5]",
        "[fd00::5]443",
        "[10.1.0.5]:443",
        "[fe80::1%eth0]:443",
        "shop:443",
        "[]:1",
        "10.1.0.5:443 ",
        " 10.1.0.5:443",
        "10.1.0.5:+443",
        "10.1.0.5:4_4",
        "1" * 1000,
        "10.1.0.5:443\n",
    ],
)
def test_bad_endpoints(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_endpoint(text)


def test_port_zero_is_accepted_only_if_permitted() -> None:
    assert parse_endpoint("127.0.0.1:0", zero_port=True)[1] == 0
    with pytest.raises(BadAddress):
        parse_port("00", zero=True)


@given(st.text(max_size=80))
def test_garbage_gives_badaddress_only(text: str) -> None:
    for parse in (parse_address, parse_endpoint, parse_port, parse_turn_url, lambda t: TargetList.parse([t])):
        try:
            parse(text)
        except BadAddress:
            pass


REFUSED = {
    "0.0.0.0": "unspecified",
    "0.255.255.255": "unspecified",
    "127.0.0.1": "loopback",
    "127.255.255.255": "loopback",
    "169.254.169.254": "link-local",
    "224.0.0.1": "multicast",
    "239.255.255.255": "multicast",
    "240.0.0.1": "reserved",
    "255.255.255.255": "reserved",
    "::": "unspecified",
    "::1": "loopback",
    "fe80::1": "link-local",
    "febf::1": "link-local",
    "fe80::1%eth0": "zone",
    "ff02::1": "multicast",
    "::ffff:127.0.0.1": "IPv4-mapped",
    "::ffff:10.1.0.5": "IPv4-mapped",
    "::127.0.0.1": "IPv4-compatible",
    "64:ff9b::127.0.0.1": "loopback",
    "64:ff9b::169.254.169.254": "link-local",
    "64:ff9b::255.255.255.255": "reserved",
    "2002:7f00:1::1": "loopback",
    "2002:a9fe:a9fe::": "link-local",
    "::ffff:0:127.0.0.1": "IPv4-translated",
    "64:ff9b:1::127.0.0.1": "local NAT64",
    "64:ff9b:1:7f00:0:100::": "local NAT64",
    "2001:0:4136:e378:8000:63bf:80ff:fffe": "Teredo",
    "100.100.100.200": "cloud metadata",
    "64:ff9b::100.100.100.200": "cloud metadata",
    "168.63.129.16": "cloud metadata",
    "192.0.0.192": "cloud metadata",
    "fd00:ec2::254": "cloud metadata",
    "fd20:ce::254": "cloud metadata",
}


@pytest.mark.parametrize(("text", "why"), REFUSED.items())
def test_addresses_are_refused_in_every_representation(text: str, why: str) -> None:
    address = ip_address(text)
    said = refusal(address)
    assert said is not None
    assert why in said
    assert refusal(address, TargetList.parse(["0.0.0.0/0", "[::/0]"])) == said


@pytest.mark.parametrize(
    "text", ["10.1.0.5", "1.0.0.0", "126.255.255.255", "223.255.255.255", "fd00::5", "2001:db8::1", "64:ff9b::10.1.0.5"]
)
def test_other_addresses_may_be_dialled(text: str) -> None:
    assert refusal(ip_address(text)) is None


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("10.1.0.5", ["10.1.0.5"]),
        ("fd00::5", ["fd00::5"]),
        ("64:ff9b::10.1.0.5", ["64:ff9b::a01:5", "10.1.0.5"]),
        ("2002:a01:5::1", ["2002:a01:5::1", "10.1.0.5"]),
        ("::ffff:10.1.0.5", ["::ffff:a01:5", "10.1.0.5"]),
    ],
)
def test_spellings(text: str, spelled: list[str]) -> None:
    assert spellings(ip_address(text)) == tuple(map(ip_address, spelled))


def test_a_cidr_inside_a_refused_range_permits_its_addresses() -> None:
    allowed = TargetList.parse(["127.0.0.0/24:443", "[::1]", "126.0.0.0/7"])
    assert refusal(ip_address("127.0.0.9"), allowed) is None
    assert refusal(ip_address("127.0.1.9"), allowed) == "loopback"
    assert refusal(ip_address("::1"), allowed) is None
    assert refusal(ip_address("::ffff:127.0.0.9"), allowed) == "IPv4-mapped"
    assert refusal(ip_address("169.254.1.1"), allowed) == "link-local"


def test_target_list() -> None:
    targets = TargetList.parse(["10.0.0.0/16:443,8443,9000-9002", "10.9.0.1", "[fd00::/8]:443", "fd01::1", "1.1.1.1:*"])
    assert list(targets) == [
        "10.0.0.0/16:443,8443,9000-9002",
        "10.9.0.1/32",
        "[fd00::/8]:443",
        "[fd01::1/128]",
        "1.1.1.1/32",
    ]
    assert TargetList.parse(targets) == targets
    assert len({targets, TargetList.parse(targets)}) == 1
    for endpoint in ("10.0.9.9:443", "10.0.0.0:8443", "10.0.1.1:9001", "10.9.0.1:1", "[fd00::1]:443", "[fd01::1]:9"):
        assert targets.allows(*parse_endpoint(endpoint))
    for endpoint in ("10.1.0.0:443", "10.0.0.1:444", "10.0.1.1:9003", "10.9.0.2:1", "[fd00::1]:444", "[::1]:443"):
        assert not targets.allows(*parse_endpoint(endpoint))


def test_an_empty_list_allows_nothing() -> None:
    assert not TargetList.parse([])
    assert not TargetList().allows(ip_address("10.0.0.1"), 443)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.0/33",
        "10.0.0.1/16",
        "10.0.0.0/255.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/8:",
        "10.0.0.0/8:0",
        "shop",
        "10.0.0.0/8:9-1",
        "10.0.0.0/8:1-",
        "10.0.0.0/8:1,,2",
        "10.0.0.0/8:http",
        "[10.0.0.0/8]:1",
        "[fd00::/8",
        "[]:1",
        "[fd00::/8]1",
        "::ffff:10.0.0.0/104",
        "fe80::%eth0/10",
        "10.0.0.0/٨",
        "10.0.0.0/8:1-70000",
        "x" * 5000,
    ],
)
def test_bad_targets(text: str) -> None:
    with pytest.raises(BadAddress):
        TargetList.parse([text])


def test_lists_are_bounded() -> None:
    with pytest.raises(BadAddress):
        TargetList.parse("10.0.0.1" for _ in range(1_000_000))
    assert parse_cidrs(["10.0.0.0/8", "fd00::1"]) == (ip_network("10.0.0.0/8"), ip_network("fd00::1"))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("turn:10.0.0.8:3478?transport=tcp", TurnUrl("10.0.0.8", 3478, False)),
        ("turn:10.0.0.8", TurnUrl("10.0.0.8", 3478, False)),
        ("turns:Turn.Example", TurnUrl("turn.example", 5349, True)),
        ("turns:[FD00::5]:443?transport=tcp", TurnUrl("fd00::5", 443, True)),
    ],
)
def test_turn_urls(text: str, url: TurnUrl) -> None:
    assert parse_turn_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "turn:",
        "stun:10.0.0.8",
        "turn:10.0.0.8:0",
        "turn:10.0.0.8:",
        "turn:10.0.0.8?transport=udp",
        "turn:a_b",
        "turn:10.0.0",
        "turn:[10.0.0.8]",
        "turn:fd00::5",
        "turn:user@host",
        "turn:host/path",
        "turn:" + "a." * 400,
    ],
)
def test_bad_turn_urls(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_turn_url(text)


def test_addresses_with_a_zone_are_refused() -> None:
    with pytest.raises(BadAddress):
        parse_address("fe80::1%1")
    assert parse_address("FD00::0005") == IPv6Address("fd00::5")
