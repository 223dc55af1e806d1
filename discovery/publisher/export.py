"""What a Service asks to have exported, and what of that cannot be. Sans-IO.

The annotation crossnet.io/export exports a Service: `true` for all its TCP ports, or a comma-separated list of port names or
numbers. A ServiceExport of the same name means `true`, unless there is the annotation as well. crossnet.io/proxy-protocol is the
PROXY protocol header that the Service expects: `v1`, `v2`, or `true` for v2. crossnet.io/health-check has its endpoints checked by
relays and gateways: `tcp` or `tls`, and optionally the seconds between two checks, such as `tls 30`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from discovery.model.names import MAX_PORT
from discovery.model.spec import MAX_CHECK_INTERVAL_S, MAX_PORTS, HealthCheck, is_port_name
from discovery.publisher.objects import Port, ServiceObject

EXPORT = "crossnet.io/export"
PROXY_PROTOCOL = "crossnet.io/proxy-protocol"
HEALTH_CHECK = "crossnet.io/health-check"
MAX_LISTED = 8  # items that a sentence names; the others are counted
MAX_ITEM = 63  # characters of an annotation's item that a sentence repeats

_HEADERS: Mapping[str, bool | Literal["v1", "v2"]] = {"true": True, "v1": "v1", "v2": "v2"}
_NO_HEADER = ("", "false")
_HEALTH = re.compile(r"(tcp|tls)(?:\s+([0-9]{1,4})s?)?")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a Service asks for and does not get."""

    reason: str
    """One word for programs, as Kubernetes' Events have it."""

    message: str
    """A sentence for people."""

    warning: bool = True
    """False: nobody asked for it by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What a Service asks for."""

    ports: tuple[tuple[str, int], ...]
    """Name and number of each port to publish; none if nothing can be published."""

    proxy_protocol: bool | Literal["v1", "v2"]
    health: HealthCheck | None
    findings: tuple[Finding, ...]

    @property
    def port_names(self) -> dict[str, int]:
        """The ports' numbers by name, of those that have a name."""
        return {name: number for name, number in self.ports if is_port_name(name)}


def read_export(found: ServiceObject, *, by_object: bool = False) -> Export | None:
    """Return what a Service asks for; None: it does not ask to be exported. `by_object`: there is a ServiceExport for it."""
    annotations = found.metadata.annotations or {}
    wanted = {item.strip() for item in annotations.get(EXPORT, "").split(",")} - {""}
    if not wanted and by_object:
        wanted = {"true"}
    if not wanted or (wanted == {"false"} and not by_object):
        return None
    if wanted == {"false"}:
        message = f"not exported: the annotation {EXPORT} is false, and there is a ServiceExport"
        return Export(ports=(), proxy_protocol=False, health=None, findings=(Finding("Contradiction", message),))
    findings: list[Finding] = []
    ports: tuple[tuple[str, int], ...] = ()
    if found.spec.type == "ExternalName":
        findings.append(
            Finding("ExternalName", "not exported: a Service of type ExternalName is an alias and has no endpoints")
        )
    else:
        ports = tuple(_ports(found.spec.ports or [], wanted, findings))
    header, health = annotations.get(PROXY_PROTOCOL, ""), annotations.get(HEALTH_CHECK, "")
    if header not in _HEADERS and header not in _NO_HEADER:
        message = f"no PROXY header: expected {PROXY_PROTOCOL} v1, v2 or true, got {_shown(header)}"
        findings.append(Finding("InvalidAnnotation", message))
    check = _health(health)
    if check is None and health.strip():
        message = f"no checks: expected {HEALTH_CHECK} such as tcp or tls 30, got {_shown(health)}"
        findings.append(Finding("InvalidAnnotation", message))
    return Export(ports=ports, proxy_protocol=_HEADERS.get(header, False), health=check, findings=tuple(findings))


def listed(items: Iterable[str]) -> str:
    """Return items for a sentence: the first of them, and how many more there are."""
    found = list(items)
    more = len(found) - MAX_LISTED
    return ", ".join(found[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _ports(ports: list[Port], wanted: set[str], findings: list[Finding]) -> Iterator[tuple[str, int]]:
    """Yield the ports to publish, and note what is asked for and left out."""
    every = wanted == {"true"}
    tcp, other, left = [], [], set(wanted)
    for port in ports:
        name, number = port.name or "", port.port
        if number is None or not 1 <= number <= MAX_PORT:
            continue
        if every or name in wanted or str(number) in wanted:
            left -= {name, str(number)}
            if port.is_tcp:
                tcp.append((name, number))
            else:
                other.append(f"{name or number} ({port.protocol})")
    if left and not every:
        has = listed(port.name or str(port.port) for port in ports) or "none"
        unknown = listed(sorted(map(_shown, left)))
        message = f"{EXPORT} names ports that the Service does not have: {unknown}; it has {has}"
        findings.append(Finding("UnknownPort", message))
    if other:
        what = "not exported" if not tcp else "exported without some ports"
        message = f"{what}: only TCP is carried, not {listed(other)}"
        findings.append(Finding("NotTcp", message, warning=not tcp or not every))
    elif not tcp and (every or not left):
        findings.append(Finding("NoPorts", "not exported: the Service has no ports"))
    if len(tcp) > MAX_PORTS:
        beyond = listed(name or str(number) for name, number in tcp[MAX_PORTS:])
        message = f"exported without some ports: {MAX_PORTS} is the limit, and the Service has {len(tcp)}: not {beyond}"
        findings.append(Finding("TooManyPorts", message))
    yield from tcp[:MAX_PORTS]


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_ITEM else text[: MAX_ITEM - 1] + "…")


def _health(asked: str) -> HealthCheck | None:
    found = _HEALTH.fullmatch(asked.strip())
    if found is None:
        return None
    check: Literal["tcp", "tls"] = "tls" if found[1] == "tls" else "tcp"
    if found[2] is None:
        return HealthCheck(check=check)
    interval_s = int(found[2])
    return HealthCheck(check=check, interval_s=interval_s) if 1 <= interval_s <= MAX_CHECK_INTERVAL_S else None
