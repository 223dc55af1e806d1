"""A stable virtual address for each imported service, for protocols in which the relay cannot read a name.

For a given name, every resolver of a network tries the same addresses in the same order. It claims the first free one with a
record whose id is the address and which is created only if it does not exist. So two names never share an address, and all
resolvers agree even if they write at once: the loser of a race finds the other's record and tries the next address.

Sans-IO.
"""

from collections.abc import Iterator
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network, ip_address

from discovery.model.addresses import Address
from discovery.model.imports import Imports
from discovery.model.mesh import Kind, Mesh, Record, VipSpec

MAX_DRAWS = 32  # in a range that is half full, all are taken with a probability of 1 in 4 × 10⁹


def draws(name: str, vips: IPv4Network | IPv6Network) -> Iterator[Address]:
    """Yield the addresses that a name may get, in order; never the first or last of the range."""
    first, last = int(vips[0]) + 1, int(vips[-1]) - 1
    for turn in range(MAX_DRAWS):
        number = int.from_bytes(blake2b(f"{turn} {name}".encode(), digest_size=16).digest(), "big")
        yield vips[first - int(vips[0]) + number % (last - first + 1)]


def record_id(address: Address) -> str:
    """Return the id of the record that claims an address."""
    return address.exploded.replace(":", "-").replace(".", "-")


def address_of(name: str, mesh: Mesh, network: str, vips: IPv4Network | IPv6Network) -> Address | None:
    """Return the address that a name has, or None if it has none yet."""
    for address in draws(name, vips):
        record = mesh.record(Kind.VIP, network, record_id(address))
        if record is None or not isinstance(record.spec, VipSpec):
            return None
        if record.spec.name == name:
            return address
    return None


def claim(name: str, mesh: Mesh, network: str, vips: IPv4Network | IPv6Network) -> tuple[str, VipSpec] | None:
    """Return the id and content of the record to create for a name; None: it has an address, or no address is free."""
    for address in draws(name, vips):
        record = mesh.record(Kind.VIP, network, record_id(address))
        if record is None:
            return record_id(address), VipSpec(name=name, address=str(address))
        if isinstance(record.spec, VipSpec) and record.spec.name == name:
            return None
    return None


def imported_names(mesh: Mesh, imports: Imports) -> Iterator[str]:
    """Yield the names of all imported services."""
    for network in sorted({source for rule in imports.rules for source in rule.sources}):
        for service in mesh.services(network):
            rule = imports.rule_for(service.spec.name)
            if rule is not None and network in rule.sources:
                yield service.spec.name


def reverse(records: tuple[Record[VipSpec], ...]) -> dict[str, str]:
    """Map the reverse names of claimed addresses, as in PTR questions, to the names of their services."""
    return {ip_address(record.spec.address).reverse_pointer: record.spec.name for record in records}
