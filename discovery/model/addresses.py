"""Addresses and ports: endpoints as text, lists of allowed targets, and addresses that are never dialled.

Refused ranges are refused in every representation: also as an IPv6 address that a NAT64 or 6to4 router would translate to a
refused IPv4 address, or whose IPv4 address cannot be determined. Sans-IO. The only error is BadAddress.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from discovery.model.names import MAX_PORT, is_ldh_label

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

MAX_ENDPOINT_TEXT = 64  # "[" + 45 characters of the longest IPv6 text + "]:65535", rounded up
MAX_TARGET_TEXT = 1024  # one CIDR and about a hundred ports
MAX_TARGETS = 4096  # a longer list should use CIDRs
MAX_TURN_URL = 512

_PORT = re.compile(r"[1-9][0-9]{0,4}")
_TURN_URL = re.compile(r"(turns?):(\[[^\]]*\]|[^:?\[\]]*)(?::([^?]*))?(?:\?(.*))?", re.ASCII | re.DOTALL)


PRIVATE_RANGES: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "::1/128",
        "fc00::/7",
        "fe80::/10",
    )
)
"""Clients that may use a relay or a resolver by default: this host, RFC 1918, RFC 6598, RFC 4193, link-local addresses."""


class BadAddress(ValueError):
    """Text that is not a valid address, endpoint, target or TURN URL. The message says what was expected."""


@dataclass(frozen=True, slots=True)
class TurnUrl:
    """A TURN server's URL (RFC 7065), over TCP or, with `tls`, over TLS."""

    host: str
    port: int
    tls: bool


def parse_address(text: str) -> Address:
    """Parse an IP address without a zone. Raises BadAddress."""
    if len(text) > MAX_ENDPOINT_TEXT:
        raise BadAddress(f"expected an IP address, got {len(text)} characters")
    try:
        address = ip_address(text)
    except ValueError:
        raise BadAddress(f"expected an IP address, got {text!r}") from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise BadAddress(f"expected an IP address without a zone, got {text!r}")
    return address


def parse_port(text: str, *, zero: bool = False) -> int:
    """Parse a port, 1-65535 without leading zeros. `zero` also permits 0. Raises BadAddress."""
    if zero and text == "0":
        return 0
    if not _PORT.fullmatch(text) or int(text) > MAX_PORT:
        raise BadAddress(f"expected a port 1-{MAX_PORT} without leading zeros, got {text[:16]!r}")
    return int(text)


def parse_endpoint(text: str, *, zero_port: bool = False) -> tuple[Address, int]:
    """Parse "ip:port" or "[v6]:port". `zero_port` also permits port 0 ("any"). Raises BadAddress."""
    if len(text) > MAX_ENDPOINT_TEXT:
        raise BadAddress(f"expected ip:port, got {len(text)} characters")
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not bracketed):
        raise BadAddress(f"expected ip:port or [ipv6]:port, got {text!r}")
    address = parse_address(host[1:-1] if bracketed else host)
    if bracketed != (address.version == 6):
        raise BadAddress(f"expected ip:port or [ipv6]:port, got {text!r}")
    return address, parse_port(port, zero=zero_port)


def format_endpoint(address: Address, port: int) -> str:
    """Format "ip:port" or "[v6]:port"."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def parse_turn_url(text: str) -> TurnUrl:
    """Parse "turn:HOST[:PORT][?transport=tcp]" or "turns:…" (RFC 7065). Raises BadAddress.

    HOST is an IP address or a DNS name. UDP is refused: TCP allocations cannot be made over it (RFC 6062 section 4.1).
    """
    expected = "expected turn:HOST:PORT?transport=tcp or turns:HOST:PORT?transport=tcp"
    if len(text) > MAX_TURN_URL:
        raise BadAddress(f"{expected}, got {len(text)} characters")
    match = _TURN_URL.fullmatch(text)
    if match is None or match[4] not in (None, "transport=tcp"):
        raise BadAddress(f"{expected}, got {text!r}")
    scheme, host, port = match[1], match[2].lower(), match[3]
    if host.startswith("["):
        host = str(parse_address(host[1:-1]))
        if ":" not in host:
            raise BadAddress(f"{expected}, got {text!r}")
    elif host.rpartition(".")[2].isdigit():
        host = str(parse_address(host))
    elif len(host) > 253 or not all(map(is_ldh_label, host.split("."))):
        raise BadAddress(f"{expected}, got {text!r}")
    tls = scheme == "turns"
    default = 5349 if tls else 3478  # RFC 8656 section 5
    return TurnUrl(host, default if port is None else parse_port(port), tls)


def parse_cidrs(items: Iterable[str]) -> tuple[Network, ...]:
    """Parse CIDRs or single addresses, without ports. Raises BadAddress."""
    return tuple(_parse_cidr(item) for item in _bounded(items))


@dataclass(frozen=True, slots=True)
class _Entry:
    network: Network
    ports: tuple[tuple[int, int], ...]  # inclusive ranges, as written

    def __str__(self) -> str:
        text = f"[{self.network}]" if self.network.version == 6 else str(self.network)
        if self.ports == _ALL_PORTS:
            return text
        return text + ":" + ",".join(str(low) if low == high else f"{low}-{high}" for low, high in self.ports)


_ALL_PORTS = ((1, MAX_PORT),)


class TargetList:
    """Addresses and ports that may be dialled: `CIDR[:PORTS]`, or `[CIDR]:PORTS` for IPv6; PORTS is a list of N, N-M or *."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[_Entry] = ()) -> None:
        """Use `parse` to make a list. Without entries it allows nothing."""
        self._entries = tuple(entries)

    @classmethod
    def parse(cls, items: Iterable[str]) -> "TargetList":
        """Parse a list as in the configuration file. Raises BadAddress at the first invalid item."""
        return cls(_parse_target(item) for item in _bounded(items))

    def allows(self, address: Address, port: int) -> bool:
        """Return whether one of the items contains this address and port."""
        return any(
            address in entry.network and any(low <= port <= high for low, high in entry.ports)
            for entry in self._entries
        )

    @property
    def networks(self) -> tuple[Network, ...]:
        """The CIDRs of the items, in order."""
        return tuple(entry.network for entry in self._entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return map(str, self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TargetList) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(self._entries)

    def __repr__(self) -> str:
        return f"TargetList({list(self)!r})"


def refusal(address: Address, allowed: TargetList | None = None) -> str | None:
    """Return why an address must not be dialled or used in a record, None if it may.

    A CIDR of `allowed` permits an address if it contains the address and lies completely inside the refused range: a test can use
    loopback by 127.0.0.0/8, while 0.0.0.0/0 permits nothing.
    """
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "has a zone"
    for network, why in _REFUSED:
        if network.version == address.version and address in network:
            if allowed is not None and any(
                network.version == lifting.version and address in lifting and _inside(lifting, network)
                for lifting in allowed.networks
            ):
                continue
            return why
    return None


_REFUSED_IPV4 = (
    (IPv4Network("0.0.0.0/8"), "unspecified"),  # RFC 6890: "this network"; Linux dials 0.0.0.0 as loopback
    (IPv4Network("127.0.0.0/8"), "loopback"),
    (IPv4Network("169.254.0.0/16"), "link-local"),  # most cloud metadata services are here
    (IPv4Network("100.100.100.200/32"), "cloud metadata"),  # Alibaba
    (IPv4Network("168.63.129.16/32"), "cloud metadata"),  # Azure's WireServer
    (IPv4Network("192.0.0.192/32"), "cloud metadata"),  # Oracle, formerly
    (IPv4Network("224.0.0.0/4"), "multicast"),
    (IPv4Network("240.0.0.0/4"), "reserved"),  # includes 255.255.255.255
)
_REFUSED_IPV6 = (
    (IPv6Network("::/128"), "unspecified"),
    (IPv6Network("::1/128"), "loopback"),
    (IPv6Network("::ffff:0:0/96"), "IPv4-mapped"),
    (IPv6Network("::/96"), "IPv4-compatible"),  # RFC 4291 section 2.5.5.1, deprecated
    (IPv6Network("::ffff:0:0:0/96"), "IPv4-translated"),  # RFC 2765 section 2.1
    # RFC 8215: each site decides where the IPv4 address is in it.
    (IPv6Network("64:ff9b:1::/48"), "behind a local NAT64"),
    (IPv6Network("2001::/32"), "Teredo"),  # RFC 4380: a tunnel to any IPv4 address
    (IPv6Network("fd00:ec2::254/128"), "cloud metadata"),  # AWS
    (IPv6Network("fd20:ce::254/128"), "cloud metadata"),  # Google
    (IPv6Network("fe80::/10"), "link-local"),
    (IPv6Network("ff00::/8"), "multicast"),
)


def _refused() -> Iterator[tuple[Network, str]]:
    yield from _REFUSED_IPV4
    yield from _REFUSED_IPV6
    for network, why in _REFUSED_IPV4:
        bits = int(network.network_address)
        nat64 = int(IPv6Address("64:ff9b::")) | bits  # RFC 6052 section 2.1
        yield IPv6Network((nat64, 96 + network.prefixlen)), f"{why} behind NAT64"
        six_to_four = int(IPv6Address("2002::")) | bits << 80  # RFC 3056 section 2
        yield IPv6Network((six_to_four, 16 + network.prefixlen)), f"{why} behind 6to4"


_REFUSED: tuple[tuple[Network, str], ...] = tuple(_refused())
_NAT64 = IPv6Network("64:ff9b::/96")


def spellings(address: Address) -> tuple[Address, ...]:
    """Return the address and, for a NAT64 or 6to4 address, the IPv4 address that a router translates it to."""
    if isinstance(address, IPv4Address):
        return (address,)
    within = IPv4Address(int(address) & 0xFFFF_FFFF) if address in _NAT64 else address.ipv4_mapped or address.sixtofour
    return (address,) if within is None else (address, within)


def _inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.prefixlen >= outer.prefixlen and inner.network_address in outer


def _bounded(items: Iterable[str]) -> Iterator[str]:
    for count, item in enumerate(items):
        if count >= MAX_TARGETS:
            raise BadAddress(f"expected at most {MAX_TARGETS} items")
        yield item


def _parse_cidr(text: str) -> Network:
    if len(text) > MAX_ENDPOINT_TEXT:
        raise BadAddress(f"expected a CIDR, got {len(text)} characters")
    if "%" in text:
        raise BadAddress(f"expected a CIDR without a zone, got {text!r}")
    _, slash, length = text.partition("/")
    try:
        # A mask instead of a length ("10.0.0.0/255.0.0.0") is refused: a host mask, written by mistake, would be accepted, too.
        if slash and not (length.isascii() and length.isdigit() and len(length) <= 3):
            raise ValueError(length)
        network = ip_network(text, strict=False)
    except ValueError:
        raise BadAddress(f"expected a CIDR such as 10.0.0.0/8, got {text!r}") from None
    if isinstance(network, IPv6Network) and _inside(network, IPv6Network("::ffff:0:0/96")):
        raise BadAddress(f"expected an IPv4 CIDR, got {text!r}, which is IPv4-mapped")
    if slash and network.network_address != ip_address(text.partition("/")[0]):
        raise BadAddress(f"expected a CIDR without host bits such as {network}, got {text!r}")
    return network


def _parse_target(text: str) -> _Entry:
    if len(text) > MAX_TARGET_TEXT:
        raise BadAddress(f"expected CIDR[:PORTS], got {len(text)} characters")
    if text.startswith("["):
        cidr, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in cidr:
            raise BadAddress(f"expected [CIDR]:PORTS, got {text!r}")
        return _Entry(_parse_cidr(cidr), _parse_ports(rest[1:], text) if rest else _ALL_PORTS)
    if text.count(":") > 1:
        return _Entry(_parse_cidr(text), _ALL_PORTS)
    cidr, colon, ports = text.partition(":")
    return _Entry(_parse_cidr(cidr), _parse_ports(ports, text) if colon else _ALL_PORTS)


def _parse_ports(ports: str, text: str) -> tuple[tuple[int, int], ...]:
    ranges = []
    for item in ports.split(","):
        if item == "*":
            ranges.append(_ALL_PORTS[0])
            continue
        low, hyphen, high = item.partition("-")
        try:
            first = parse_port(low)
            last = parse_port(high) if hyphen else first
        except BadAddress:
            raise BadAddress(f"expected PORTS as N, N-M or *, got {item[:16]!r} in {text!r}") from None
        if last < first:
            raise BadAddress(f"expected PORTS in ascending order, got {item!r} in {text!r}")
        ranges.append((first, last))
    return tuple(ranges)
