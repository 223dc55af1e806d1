"""Address and protocol of an upstream, as written in the configuration.

    10.0.0.10   10.0.0.10:5353   [fd00::1]:53     UDP, and TCP for questions that came over TCP
    fe80::1%eth0   [fe80::1%eth0]:53              likewise, at a link-local address of this interface (RFC 4007 section 11)
    tcp://10.0.0.10                               TCP always (RFC 7766)
    tls://10.0.0.10#dns.example                   DNS over TLS (RFC 7858); the name is checked in the certificate
    https://10.0.0.10/dns-query#dns.example       DNS over HTTPS (RFC 8484)

An upstream is always an address, because its name could only be resolved by asking it. Without a name, the certificate must be
valid for the address. Sans-IO. The only error is BadUpstreamAddress.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address

from discovery.model.addresses import Address, format_endpoint


class BadUpstreamAddress(ValueError):
    """The text is not an upstream's address."""


class UpstreamProtocol(StrEnum):
    """The protocol used with an upstream."""

    UDP = "udp"
    TCP = "tcp"
    TLS = "tls"
    HTTPS = "https"


DEFAULT_PORTS = {
    UpstreamProtocol.UDP: 53,
    UpstreamProtocol.TCP: 53,
    UpstreamProtocol.TLS: 853,
    UpstreamProtocol.HTTPS: 443,
}
EXPECTED = "ip, ip%interface, ip:port, tcp://ip, tls://ip#name or https://ip/path#name of a DNS server"

_ZONE = r"(?:%[0-9A-Za-z._@-]{1,15})?"  # the name or the index of an interface (IFNAMSIZ is 16)
_FORM = re.compile(
    r"(?:(?P<way>udp|tcp|tls|https)://)?(?P<host>\[[0-9A-Fa-f:.]{2,45}"
    + _ZONE
    + r"\]|[0-9.]{7,15}|[0-9A-Fa-f:]{2,45}"
    + _ZONE
    + r")"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?(?P<path>/[!-\"$-~]{0,200})?(?:#(?P<name>[A-Za-z0-9.-]{1,253}))?"
)


@dataclass(frozen=True, slots=True)
class UpstreamAddress:
    """One upstream."""

    address: Address
    port: int
    way: UpstreamProtocol = UpstreamProtocol.UDP
    name: str = ""
    """Name that its certificate must be valid for; empty: its address."""

    path: str = ""
    """URL path of DNS over HTTPS."""

    def __str__(self) -> str:
        if self.way is UpstreamProtocol.UDP:
            return (
                str(self.address) if self.port == DEFAULT_PORTS[self.way] else format_endpoint(self.address, self.port)
            )
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        port = "" if self.port == DEFAULT_PORTS[self.way] else f":{self.port}"
        return f"{self.way}://{host}{port}{self.path}" + (f"#{self.name}" if self.name else "")

    @property
    def host(self) -> str:
        """Its address as text without a zone, which means nothing to others (RFC 4007 section 11.2)."""
        return str(self.address).partition("%")[0]

    @property
    def server_name(self) -> str:
        """Name or address that its certificate must be valid for."""
        return self.name or self.host

    @property
    def endpoint(self) -> tuple[Address, int]:
        """Its address and port."""
        return self.address, self.port


def parse_destination(text: str) -> UpstreamAddress:
    """Parse an upstream's address. Raises BadUpstreamAddress."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise BadUpstreamAddress(EXPECTED)
    way = UpstreamProtocol(found["way"] or "udp")
    try:
        address = ip_address(found["host"].strip("[]"))
        port = int(found["port"]) if found["port"] else DEFAULT_PORTS[way]
    except ValueError as error:
        raise BadUpstreamAddress(EXPECTED) from error
    if address.version == 6 and address.is_link_local and address.scope_id is None:
        raise BadUpstreamAddress("expected the interface of a link-local address, as in fe80::1%eth0")
    secret = way in (UpstreamProtocol.TLS, UpstreamProtocol.HTTPS)
    if port > 65535 or bool(found["path"]) != (way is UpstreamProtocol.HTTPS) or (found["name"] and not secret):
        raise BadUpstreamAddress(EXPECTED)
    return UpstreamAddress(address, port, way, (found["name"] or "").lower().rstrip("."), found["path"] or "")
