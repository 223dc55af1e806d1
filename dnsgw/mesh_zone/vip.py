"""One stable address for each imported service, for protocols in which the relay cannot read a name.

Every resolver of a network draws the same addresses for a name, in the same order, and claims the first that is free by a
record whose id is the address, created only if absent. So two names never share an address, and all resolvers agree, however
many write at once: who loses a race finds the other's record and draws again.

Sans-IO.
"""

from collections.abc import Iterator
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network, ip_address

from discovery.model.addresses import Address
from discovery.model.imports import Imports
from discovery.model.mesh import Kind, Mesh, Record, VipSpec

MAX_DRAWS = 32  # from a range that is half full the chance that all are taken is one in four thousand million


def draws(name: str, vips: IPv4Network | IPv6Network) -> Iterator[Address]:
    """The addresses that a name may have, in order: never the first or last of the range."""
    first, last = int(vips[0]) + 1, int(vips[-1]) - 1
    for turn in range(MAX_DRAWS):
        number = int.from_bytes(blake2b(f"{turn} {name}".encode(), digest_size=16).digest(), "big")
        yield vips[first - int(vips[0]) + number % (last - first + 1)]


def record_id(address: Address) -> str:
    """The id of the record that claims an address."""
    return address.exploded.replace(":", "-").replace(".", "-")


def address_of(name: str, mesh: Mesh, network: str, vips: IPv4Network | IPv6Network) -> Address | None:
    """The address that a name has; None: it has none yet."""
    for address in draws(name, vips):
        record = mesh.record(Kind.VIP, network, record_id(address))
        if record is None or not isinstance(record.spec, VipSpec):
            return None
        if record.spec.name == name:
            return address
    return None


def claim(name: str, mesh: Mesh, network: str, vips: IPv4Network | IPv6Network) -> tuple[str, VipSpec] | None:
    """The record to create, if absent, so that this name has an address; None: it has one, or none is to be had."""
    for address in draws(name, vips):
        record = mesh.record(Kind.VIP, network, record_id(address))
        if record is None:
            return record_id(address), VipSpec(name=name, address=str(address))
        if isinstance(record.spec, VipSpec) and record.spec.name == name:
            return None
    return None


def imported_names(mesh: Mesh, imports: Imports) -> Iterator[str]:
    """The names of all services that are imported."""
    for network in sorted({source for rule in imports.rules for source in rule.sources}):
        for service in mesh.services(network):
            rule = imports.rule_for(service.spec.name)
            if rule is not None and network in rule.sources:
                yield service.spec.name


def reverse(records: tuple[Record[VipSpec], ...]) -> dict[str, str]:
    """The names of claimed addresses by their names in reverse, as PTR asks for them."""
    return {ip_address(record.spec.address).reverse_pointer: record.spec.name for record in records}
