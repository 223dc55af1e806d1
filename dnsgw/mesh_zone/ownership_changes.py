"""Finds names that change hands between two states: ours in one, because they are imported and offered, upstream's in the other.

What is cached of such a name is obsolete: when a service moves into this network, a cached NXDOMAIN from upstream must not
hide it. Sans-IO.
"""

from collections.abc import Iterator

from discovery.model.imports import Imports
from discovery.model.mesh import Mesh
from dnsgw.mesh_zone.srv_names import srv_names


def is_imported(name: str, mesh: Mesh, imports: Imports) -> bool:
    """Whether a name is imported, and one of the networks that it is imported from offers it."""
    rule = imports.rule_for(name)
    return rule is not None and any(mesh.service(network, name) is not None for network in rule.sources)


def changed_owner(before: Mesh, imports_before: Imports, after: Mesh, imports_after: Imports) -> set[str]:
    """Return the names that are imported and offered in exactly one of two states.

    If the imports are the same, only networks whose services changed are looked at.
    """
    names: set[str] = set()
    same = imports_before is imports_after or imports_before.rules == imports_after.rules
    for network in _sources(imports_before) | _sources(imports_after):
        old, new = before.services(network), after.services(network)
        if not same:
            names.update(service.spec.name for service in (*old, *new))
        elif old is not new:  # a mesh keeps the same object for what did not change
            names |= {service.spec.name for service in old} ^ {service.spec.name for service in new}
    changed = {
        name for name in names if is_imported(name, before, imports_before) != is_imported(name, after, imports_after)
    }
    return changed | set(_below(changed, before, imports_before)) | set(_below(changed, after, imports_after))


def _below(names: set[str], mesh: Mesh, imports: Imports) -> Iterator[str]:
    """Yield the names below services at which they have SRV records."""
    for name in names:
        for network in _sources(imports):
            service = mesh.service(network, name)
            if service is not None:
                yield from srv_names(service.spec)


def _sources(imports: Imports) -> set[str]:
    return {source for rule in imports.rules for source in rule.sources}
