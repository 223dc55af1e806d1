"""`crossnet check -c FILE NAME…`: shows which rule of the relay and of the gateway in a file decides about a name.

It evaluates the same rules as the roles, with the mesh.yaml or the snapshot on disk. It does not have what only a running process
knows: addresses that services have lost within the last ten minutes.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

import yaml

from crossnet.app import role_configs
from crossnet.config.schema import encode
from crossnet.config.sections import Config
from crossnet.config.sections.policy import RuleSection, policy
from discovery.client import snapshot_file
from discovery.client.merged import merged
from discovery.client.mesh_file import load_mesh
from discovery.model.addresses import Address, BadAddress, TargetList, format_endpoint, parse_address, parse_port
from discovery.model.imports import Imports
from discovery.model.lookup import Unresolved, resolve
from discovery.model.mesh import Mesh
from discovery.model.names import AddressTarget, BadName, PlainName, ServiceTarget, decode, is_ldh_label, normalise
from sniproxy.access.reach import Reach
from sniproxy.access.rules import Action, Flow, Policy, Rule
from sniproxy.relay.permission import Permit
from sniproxy.transport.base import Candidate
from sniproxy.transport.local import LOCAL
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.preamble import encode_target

DEFAULT_PORT = 443
"""The port that a client dials, unless another is known."""

Target = AddressTarget | ServiceTarget


@dataclass(frozen=True, slots=True)
class Source:
    """The client and its network, as far as they are given."""

    client: Address | None = None
    network: str | None = None

    @classmethod
    def parse(cls, items: Sequence[str]) -> "Source":
        """Parse a client's address, a network, or both. Raises BadAddress."""
        client, network = None, None
        for item in items:
            if is_ldh_label(item) and not item.isdigit():
                network = item
            else:
                client = parse_address(item)
        return cls(client, network)

    def is_of(self, rule: Rule, flow: Flow) -> bool | None:
        """Whether a rule's `from` matches this source; None if that depends on something that is not given."""
        if rule.is_from_all or (self.client is not None and any(self.client in item for item in rule.clients)):
            return True
        if flow.from_network is not None and flow.from_network in rule.from_networks:
            return True
        is_open = (rule.clients and self.client is None) or (rule.from_networks and flow.from_network is None)
        return None if is_open else False


def check_names(config: Config, names: Sequence[str], sources: Sequence[str], port: int | None) -> int:
    """Print which rules decide about each name; return the exit code."""
    try:
        source = Source.parse(sources)
        if port is not None:
            parse_port(str(port))
    except BadAddress as error:
        print(f"crossnet check: {error}", file=sys.stderr)
        return 2
    mesh = view(config)
    if not len(mesh):
        print("crossnet check: no mesh.yaml and no snapshot: the services are not known", file=sys.stderr)
    status = 0
    for name in names:
        try:
            lines = list(explain(config, mesh, name, source, port))
        except BadName as error:
            print(f"crossnet check: {name}: {error}", file=sys.stderr)
            status = 1
            continue
        print("\n  ".join([name, *lines]))
    return status


def view(config: Config) -> Mesh:
    """Return the view of discovery that is available without a server: the snapshot, overlaid with the mesh file."""
    copy = None if config.snapshot is None else snapshot_file.load(config.snapshot, config.network, set_aside=False)
    mesh = Mesh.EMPTY if copy is None else copy.mesh()
    return mesh if config.static_mesh is None else merged(mesh, load_mesh(config.static_mesh, config.dialled))


def explain(config: Config, mesh: Mesh, name: str, source: Source, port: int | None) -> Iterator[str]:
    """Yield what the name means, and which rules of each role in the file decide about it. Raises BadName."""
    asked, name = decode(name, config.domain), normalise(name)
    reach = Reach(config.network, config.domain)
    reach.follow(mesh, 0.0)
    if config.relay is None and config.gateway is None:
        yield "the file has neither a relay nor a gateway"
    if config.relay is not None:
        dialled = port or next((listen.port for listen in config.relay.listen if listen.port), DEFAULT_PORT)
        yield from _at_relay(config, mesh, reach, asked, name, source, dialled)
    if config.gateway is not None:
        yield from _at_gateway(config, mesh, reach, asked, name, source, port)


def _at_relay(
    config: Config, mesh: Mesh, reach: Reach, asked: Target | PlainName, name: str, source: Source, port: int
) -> Iterator[str]:
    section = config.relay
    assert section is not None
    imports, rules = role_configs.imports(config), policy(section.rules)
    permit = Permit(config.network, imports, rules, reach)
    try:
        targets = [place.target for place in resolve(asked, mesh, imports, config.domain, local_port=port).candidates]
    except Unresolved as error:
        if len(mesh):
            yield f"relay: refused, {error.reason}: {error.detail}"
            return
        targets = list(_guessed(asked, imports, port))
        if not targets:
            yield f"relay: refused, {error.reason}: {error.detail}"
    for target in targets:
        is_local = target.network == config.network
        for address, dialled in _places(reach, target) if is_local else [(None, target.port)]:
            candidate = _candidate(target, address, dialled, is_local=is_local)
            flow = permit.flow(candidate, source.client or _NOBODY, name)
            for line in _decisions(rules, section.rules, flow, source):
                yield f"relay: {_shown(target, address, dialled)}: {line}"
            if not rules.rules:
                why = permit.not_imported(candidate)
                yield f"relay: {_shown(target, address, dialled)}: {why or _may_go(target, config, imports)}"
            if is_local and address is not None and not TargetList.parse(section.deliver).allows(address, dialled):
                yield f"relay: {format_endpoint(address, dialled)} is not in relay.deliver: it is never dialled"


def _at_gateway(
    config: Config,
    mesh: Mesh,
    reach: Reach,
    asked: Target | PlainName,
    name: str,
    source: Source,
    port: int | None,
) -> Iterator[str]:
    section = config.gateway
    assert section is not None
    if not isinstance(asked, PlainName) and asked.network != config.network:
        if config.relay is None:
            yield f"gateway: refused, wrong_target: it is a name of network {asked.network!r}"
        return
    targets: list[Target] = []
    if isinstance(asked, PlainName):
        service = mesh.service(config.network, asked.name)
        ports = [port or DEFAULT_PORT] if service is None else sorted(map(int, service.spec.ports))
        if service is not None or not len(mesh):
            targets = [ServiceTarget(config.network, asked.name, each) for each in ports]
        elif config.relay is None:
            yield f"gateway: refused, unknown_name: network {config.network!r} has no service {asked.name!r}"
    elif not len(mesh):
        targets = [asked]
    else:
        try:
            targets = [place.target for place in resolve(asked, mesh, Imports(), config.domain).candidates]
        except Unresolved as error:
            yield f"gateway: refused, {error.reason}: {error.detail}"
    rules, allowed = policy(section.rules), TargetList.parse(section.allow)
    for target in targets:
        for address, dialled in _places(reach, target):
            shown = _shown(target, address, dialled)
            if address is not None and not allowed.allows(address, dialled):
                yield f"gateway: {shown}: denied, it is not in gateway.allow"
                continue
            flow = reach.flow(
                target,
                name=name,
                client=source.client or _NOBODY,
                from_network=source.network,
                address=address,
                port=dialled,
            )
            for line in _decisions(rules, section.rules, flow, source):
                yield f"gateway: {shown}: {line}"
            if not rules.rules:
                yield f"gateway: {shown}: no rules: it may go"


def _may_go(target: Target, config: Config, imports: Imports) -> str:
    if imports and isinstance(target, AddressTarget) and target.network != config.network:
        return "no rules: it may go, unless its gateway knows it as an address of a service that is not imported"
    return "no rules: it may go"


_NOBODY = IPv4Address(0)
"""Placeholder for a client that is not given."""


def _guessed(asked: Target | PlainName, imports: Imports, port: int) -> Iterator[Target]:
    """Yield the targets that a name may mean, judging by the name itself and the imports."""
    if not isinstance(asked, PlainName):
        yield asked
    elif (rule := imports.rule_for(asked.name)) is not None:
        for network in rule.sources:
            yield ServiceTarget(network, asked.name, port)


def _places(reach: Reach, target: Target) -> Sequence[tuple[Address | None, int]]:
    """Return the endpoints for a target of our own network; without an address if no endpoint is known."""
    if isinstance(target, AddressTarget):
        return [(target.address, target.port)]
    return reach.endpoints(target.service, target.port) or [(None, target.port)]


def _candidate(target: Target, address: Address | None, port: int, *, is_local: bool) -> Candidate:
    where = target.address if isinstance(target, AddressTarget) else address or target.service
    return Candidate(
        traits=LOCAL if is_local else TURN,
        network=target.network,
        target=encode_target(where, port),
        address="",
        port=0,
        meant=target,
    )


def _shown(target: Target, address: Address | None, port: int) -> str:
    if isinstance(target, AddressTarget):
        return f"{format_endpoint(target.address, target.port)} in network {target.network!r}"
    known = "" if address is None else f" at {format_endpoint(address, port)}"
    return f"{target.service}:{target.port} in network {target.network!r}{known}"


def _decisions(rules: Policy, sections: Sequence[RuleSection], flow: Flow, source: Source) -> Iterator[str]:
    """Yield the rules that may decide, in order, up to the first that certainly does."""
    for index in rules.concerning(flow):
        rule = rules.rules[index]
        is_of = source.is_of(rule, flow)
        if is_of is False:
            continue
        verb = "allows" if rule.action is Action.ALLOW else "denies"
        yield f"rule {index + 1} {verb} it{'' if is_of else ' to its `from`'}: {_text(sections[index])}"
        if is_of:
            return
    if rules.rules:
        yield "no rule allows it"


def _text(section: RuleSection) -> str:
    document = encode(RuleSection, section)
    assert isinstance(document, dict)
    given = {key: value for key, value in document.items() if value != []}
    return yaml.safe_dump(given, sort_keys=False, default_flow_style=True, width=10_000).strip()
