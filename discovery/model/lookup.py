"""Resolves a name to the places that can serve it, for relay and resolver.

The places are in order of preference. Whether there is a route to them, and whether policy allows it, is decided elsewhere.
Sans-IO. The only error is Unresolved.
"""

from dataclasses import dataclass
from enum import StrEnum

from discovery.model.addresses import Address, format_endpoint
from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Mesh, Record, ServiceSpec
from discovery.model.names import AddressTarget, BadName, PlainName, ServiceTarget, decode


class UnresolvedReason(StrEnum):
    """Why a name does not resolve. The values are also end reasons of streams."""

    BAD_NAME = "bad_name"
    UNKNOWN_NETWORK = "unknown_network"
    UNKNOWN_NAME = "unknown_name"
    AMBIGUOUS_NAME = "ambiguous_name"
    AMBIGUOUS_PORT = "ambiguous_port"
    WRONG_TARGET = "wrong_target"


class Unresolved(LookupError):
    """A name that does not resolve. `bad_name` is the cause of BAD_NAME, None for other reasons."""

    def __init__(self, reason: UnresolvedReason, detail: str, bad_name: BadName | None = None) -> None:
        """`reason` is for metrics, `detail` is a sentence for people."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.bad_name = bad_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One place that can serve a name."""

    network: str
    target: AddressTarget | ServiceTarget
    """The target in that network. A service has its full name here, even if the name that was asked for is a prefix of it."""

    service: Record[ServiceSpec] | None
    """The service's record, which has endpoints only in the own network. None for an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """All places that can serve a name."""

    asked: AddressTarget | ServiceTarget | PlainName
    candidates: tuple[Place, ...]
    """At least one, the preferred one first."""

    rule: ImportRule | None = None
    """The rule that imports a plain name, None for other names."""


def resolve(
    asked: str | bytes | AddressTarget | ServiceTarget | PlainName,
    mesh: Mesh,
    imports: Imports,
    domain: str,
    *,
    local_port: int | None = None,
) -> Resolution:
    """Resolve a name. Raises Unresolved.

    The port of a plain name is the port that the client dialled, `local_port`, if the service has it, or else the service's
    only port; otherwise it is AMBIGUOUS_PORT. Without `local_port` (a resolver does not know it) it is the lowest port.
    """
    if isinstance(asked, str | bytes):
        try:
            asked = decode(asked, domain)
        except BadName as error:
            raise Unresolved(UnresolvedReason.BAD_NAME, error.detail, error) from error
    match asked:
        case AddressTarget(network=network):
            _check_network(network, mesh)
            return Resolution(asked=asked, candidates=(Place(network=network, target=asked, service=None),))
        case ServiceTarget():
            return Resolution(asked=asked, candidates=(_service(asked, mesh),))
        case PlainName():
            return _plain(asked, mesh, imports, local_port)


def reached(name: str, where: Address | str, port: int, mesh: Mesh, network: str, domain: str) -> Place:
    """Check that a name resolves to a target in `network`, by that network's records. This needs no import.

    A gateway checks the proven name of a stream against the target that the relay requests. A plain name has no port, so it
    matches any port; the caller checks whether the service has that port.

    Raises Unresolved: WRONG_TARGET if the name resolves to another target or network.
    """
    try:
        asked = decode(name, domain)
    except BadName as error:
        raise Unresolved(UnresolvedReason.BAD_NAME, error.detail, error) from error
    target: AddressTarget | ServiceTarget
    if isinstance(where, str):
        target, shown = ServiceTarget(network, where, port), f"{where}:{port}"
    else:
        target, shown = AddressTarget(network, where, port), format_endpoint(where, port)
    if not isinstance(asked, PlainName) and asked.network != network:
        detail = f"{name!r} is a name of network {asked.network!r}, and this is {network!r}"
        raise Unresolved(UnresolvedReason.WRONG_TARGET, detail)
    service = None
    if isinstance(asked, AddressTarget):
        meant: AddressTarget | ServiceTarget = asked
    elif isinstance(target, AddressTarget):
        detail = f"the relay asks for {shown}, but {name!r} is not an address name under {domain}"
        raise Unresolved(UnresolvedReason.WRONG_TARGET, detail)
    elif isinstance(asked, ServiceTarget):
        service = _one_service(asked, mesh)
        meant = ServiceTarget(network, service.spec.name, asked.port)
    else:
        service = mesh.service(network, asked.name)
        if service is None:
            raise Unresolved(UnresolvedReason.UNKNOWN_NAME, f"network {network!r} has no service {asked.name!r}")
        meant = ServiceTarget(network, asked.name, port)
    if meant != target:
        actual = meant.service if isinstance(meant, ServiceTarget) else str(meant.address)
        detail = f"the relay asks for {shown}, but {name!r} leads to {actual}, port {meant.port}"
        raise Unresolved(UnresolvedReason.WRONG_TARGET, detail)
    return Place(network=network, target=meant, service=service)


def _check_network(network: str, mesh: Mesh) -> None:
    if network not in mesh.networks:
        raise Unresolved(UnresolvedReason.UNKNOWN_NETWORK, f"discovery knows no network {network!r}")


def _one_service(asked: ServiceTarget, mesh: Mesh) -> Record[ServiceSpec]:
    found = mesh.services_beginning(asked.network, asked.service)
    if not found:
        raise Unresolved(
            UnresolvedReason.UNKNOWN_NAME,
            f"network {asked.network!r} has no service {asked.service!r}, nor one beginning with it",
        )
    if len(found) > 1:
        raise Unresolved(
            UnresolvedReason.AMBIGUOUS_NAME,
            f"{asked.service!r} is or begins {len(found)} services of network {asked.network!r}, "
            f"such as {found[0].spec.name!r} and {found[1].spec.name!r}: give more labels",
        )
    return found[0]


def _service(asked: ServiceTarget, mesh: Mesh) -> Place:
    _check_network(asked.network, mesh)
    service = _one_service(asked, mesh)
    spec = service.spec
    if str(asked.port) not in spec.ports:
        raise Unresolved(
            UnresolvedReason.UNKNOWN_NAME,
            f"service {spec.name!r} of network {asked.network!r} has no port {asked.port}, only {_port_list(spec)}",
        )
    target = ServiceTarget(asked.network, spec.name, asked.port)
    return Place(network=asked.network, target=target, service=service)


def _plain(asked: PlainName, mesh: Mesh, imports: Imports, local_port: int | None) -> Resolution:
    rule = imports.rule_for(asked.name)
    if rule is None:
        raise Unresolved(UnresolvedReason.UNKNOWN_NAME, f"no import rule has the name {asked.name!r}")
    candidates = []
    unclear: Record[ServiceSpec] | None = None
    for network in rule.sources:
        service = mesh.service(network, asked.name)
        if service is None:
            continue
        port = _port(service.spec, local_port)
        if port is None:
            unclear = service
            continue
        target = ServiceTarget(network, asked.name, port)
        candidates.append(Place(network=network, target=target, service=service))
    if candidates:
        return Resolution(asked=asked, candidates=tuple(candidates), rule=rule)
    if unclear is not None:
        raise Unresolved(
            UnresolvedReason.AMBIGUOUS_PORT,
            f"service {asked.name!r} of network {unclear.network!r} has ports {_port_list(unclear.spec)}, "
            f"and none is the relay's own, {local_port}",
        )
    raise Unresolved(
        UnresolvedReason.UNKNOWN_NAME,
        f"{asked.name!r} is imported, but none of the networks {', '.join(rule.sources)} has a service of that name",
    )


def _port(spec: ServiceSpec, local_port: int | None) -> int | None:
    if local_port is not None and str(local_port) in spec.ports:
        return local_port
    if len(spec.ports) == 1 or local_port is None:
        return min(map(int, spec.ports), default=None)
    return None


def _port_list(spec: ServiceSpec) -> str:
    shown = sorted(map(int, spec.ports))
    return ", ".join(map(str, shown[:8])) + (" and more" if len(shown) > 8 else "") or "none"
