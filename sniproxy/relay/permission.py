"""What a relay's clients may reach: decided by `relay.rules` and, if there are no rules, by the imports. Sans-IO."""

from collections.abc import Sequence
from dataclasses import replace

from discovery.model.addresses import Address
from discovery.model.imports import Imports
from discovery.model.names import AddressTarget, ServiceTarget
from sniproxy.access.reach import Reach
from sniproxy.access.rules import Flow, Policy
from sniproxy.transport.base import Candidate
from sniproxy.tunnel.preamble import MAX_IMPORTS_SENT, UNDERSCORES, decode_target


class Permit:
    """The permissions of one relay, based on the view of discovery that `reach` follows."""

    def __init__(self, network: str, imports: Imports, policy: Policy, reach: Reach) -> None:
        self._network = network
        self._imports = imports
        self._policy = policy
        self._reach = reach

    def permitted(self, candidates: Sequence[Candidate], client: Address, name: str) -> tuple[list[Candidate], str]:
        """Return the candidates that this client may use, and why the first denied one is denied."""
        permitted, why = [], ""
        for candidate in candidates:
            refused = self.refusal(candidate, client, name)
            if refused is None:
                permitted.append(self._limited(candidate))
            else:
                why = why or refused
        return permitted, why

    def refusal(self, candidate: Candidate, client: Address, name: str) -> str | None:
        """Return why a client may not use this candidate, None if it may."""
        if not self._policy.rules:
            return self.not_imported(candidate)
        refused = self._policy.refusal(self.flow(candidate, client, name))
        return refused and f"relay.rules: {refused}, {candidate.target} in network {candidate.network!r}"

    def flow(self, candidate: Candidate, client: Address, name: str) -> Flow:
        """Return the flow that the rules are applied to."""
        meant = candidate.meant
        assert meant is not None
        address, port = decode_target(candidate.target)
        rule = self._imports.rule_for(meant.service) if isinstance(meant, ServiceTarget) else None
        return self._reach.flow(
            meant,
            name=name,
            client=client,
            from_network=self._network,
            address=None if isinstance(address, str) else address,
            port=port,
            is_plain=rule is None or candidate.network in rule.sources,
        )

    def not_imported(self, candidate: Candidate) -> str | None:
        """Return why an address name needs a rule, None if it needs none. Only called if there are no rules.

        A service that is not imported must not be reachable by its address instead. A relay does not know which addresses in other
        networks belong to which service, so it tells the gateway what is imported (`Candidate.imports`).
        """
        target = candidate.meant
        if not isinstance(target, AddressTarget) or not self._imports:
            return None
        advice = (
            f"import it, or have relay.rules that allow it ({{to: [{target.network}], names: [address], action: allow}}) "
            "and whatever else clients may reach"
        )
        if target.network != self._network:
            if target.network in self._imports.sources:
                if len(self._imported(target.network)) <= MAX_IMPORTS_SENT:
                    return None
                return f"an address name of network {target.network!r}, whose imports are too many to tell its gateway: {advice}"
            return f"an address name of network {target.network!r}, from which nothing is imported: {advice}"
        services = {owner.service for owner in self._reach.owners(target.address, target.port)}
        if not services or any(self._takes(service) for service in services):
            return None
        return f"an address name of service {min(services)!r}, which is not imported from {self._network!r}: {advice}"

    def _limited(self, candidate: Candidate) -> Candidate:
        """Add the imports, so that the gateway refuses addresses of other services, unless rules decide about them."""
        is_remote_address = isinstance(candidate.meant, AddressTarget) and candidate.network != self._network
        if self._policy.rules or not self._imports or not is_remote_address:
            return candidate
        imported = self._imported(candidate.network)
        if UNDERSCORES not in candidate.proto:
            # To an older gateway they would be a broken preamble, and it knows no services with such names.
            imported = " ".join(pattern for pattern in imported.split(" ") if "_" not in pattern)
        return replace(candidate, imports=imported)

    def _imported(self, network: str) -> str:
        """Return the patterns of the services imported from a network, separated by spaces."""
        return " ".join(name for rule in self._imports.rules if network in rule.sources for name in rule.names)

    def _takes(self, service: str) -> bool:
        rule = self._imports.rule_for(service)
        return rule is not None and self._network in rule.sources
