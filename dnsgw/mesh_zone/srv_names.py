"""SRV questions about imported services: `_https._tcp.orders.shop.example`, by a port's name or number (RFC 2782).

The targets are compact names, which a relay reads from the ClientHello, whatever port it was dialled on. A service of several
networks has several targets: those of the preferred network have the best priority. A service with members, such as the pods of a
StatefulSet, has a target for each of them. Sans-IO.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from discovery.model.lookup import Resolution
from discovery.model.mesh import Mesh, ServiceSpec
from discovery.model.names import BadName, Form, PlainName, ServiceTarget, encode

MAX_TARGETS = 128
"""Targets in one answer. A record has some 80 bytes, so that it fits into an answer over TCP even if the names are long."""

_STREAMS = "_tcp"


@dataclass(frozen=True, slots=True)
class SrvName:
    """A name below that of a service, at which SRV records are."""

    service: PlainName
    port: str
    """Name or number; empty: it is the name above those with a port."""

    labels: int
    """Labels of it before those of the service."""


def parse_srv_name(text: str) -> SrvName | None:
    """Parse a normalised name, such as _https._tcp.orders.shop.example or _tcp.orders.shop.example; None: it is none of these."""
    if not text.startswith("_"):
        return None
    first, _, rest = text.partition(".")
    if "." not in rest:
        return None
    if first == _STREAMS:
        return SrvName(PlainName(rest), "", 1)
    second, _, service = rest.partition(".")
    return SrvName(PlainName(service), first[1:], 2) if second == _STREAMS and "." in service else None


def port_of(spec: ServiceSpec, asked: str) -> int | None:
    """Return the port of a service by name or number; None: it has no such port."""
    if asked in spec.ports:
        return int(asked)
    port = spec.port_names.get(asked)
    return port if port is not None and str(port) in spec.ports else None


def srv_names(spec: ServiceSpec) -> Iterator[str]:
    """Yield the names at which a service has SRV records, and the one above them."""
    yield f"{_STREAMS}.{spec.name}"
    for port in (*spec.ports, *spec.port_names):
        yield f"_{port}.{_STREAMS}.{spec.name}"


def targets(found: Resolution, asked: str, mesh: Mesh) -> Iterator[tuple[int, ServiceTarget]]:
    """Yield priority and target of each record, for a port by name or number; none if the service has no such port."""
    priority = -1
    for place in found.candidates:
        if place.service is None or (port := port_of(place.service.spec, asked)) is None:
            continue
        priority += 1
        members = mesh.members(place.network, place.service.spec.name)
        names = [member.spec.name for member in members if str(port) in member.spec.ports]
        for name in names or [place.service.spec.name]:
            yield priority, ServiceTarget(place.network, name, port)


def target_name(target: ServiceTarget, domain: str) -> str | None:
    """Return the compact name of a target or, if a label is too long for that, the mangled one; None: it has none."""
    for form in (Form.COMPACT, Form.MANGLED):
        try:
            return encode(target, domain, form)
        except BadName:
            continue
    return None
