"""Which names change hands between two states: ours in one, since they are imported and offered, and upstream's in the other.

What upstream said of such a name is then of another time: a service that moved into this network must not be missing for
as long as upstream once said that it is. Sans-IO.
"""

from discovery.model.imports import Imports
from discovery.model.mesh import Mesh


def is_imported(name: str, mesh: Mesh, imports: Imports) -> bool:
    """Tell whether a name is imported and somebody offers it."""
    rule = imports.rule_for(name)
    return rule is not None and any(mesh.service(network, name) is not None for network in rule.sources)


def changed_owner(before: Mesh, imports_before: Imports, after: Mesh, imports_after: Imports) -> set[str]:
    """The names that are imported and offered in one of two states and not in the other.

    Where the imports stay the same this costs nothing but for networks whose services changed.
    """
    names: set[str] = set()
    same = imports_before is imports_after or imports_before.rules == imports_after.rules
    for network in _sources(imports_before) | _sources(imports_after):
        old, new = before.services(network), after.services(network)
        if not same:
            names.update(service.spec.name for service in (*old, *new))
        elif old is not new:  # a mesh keeps what did not change as it is
            names |= {service.spec.name for service in old} ^ {service.spec.name for service in new}
    return {
        name for name in names if is_imported(name, before, imports_before) != is_imported(name, after, imports_after)
    }


def _sources(imports: Imports) -> set[str]:
    return {source for rule in imports.rules for source in rule.sources}
