"""Converts sections of the configuration file to the configurations of the roles."""

import dataclasses
from collections.abc import Iterable
from typing import TypeVar
from urllib.parse import urlsplit

from crossnet.config.sections import (
    Config,
    DiscoveryServerSection,
    DnsSection,
    GatewaySection,
    PublisherSection,
    RelaySection,
    TurnAccessSection,
    TurnSection,
    policy,
    search_domains,
)
from crossnet.config.types import Listen
from discovery.api import DiscoveryServerConfig
from discovery.model.addresses import BadAddress, Network, TargetList, format_endpoint, parse_address
from discovery.model.imports import Imports
from discovery.model.spec import FRAMED, GatewaySpec, TurnSpec
from discovery.publisher import PublisherConfig
from discovery.store.etcdapi import parse_endpoints
from dnsgw.config import DnsConfig
from sniproxy.relay.relay import RelayConfig
from sniproxy.tunnel import heartbeat
from sniproxy.tunnel.epoch import proto_of
from sniproxy.tunnel.preamble import UNDERSCORES, SigningKey
from turnreg.client.control_connection import Credentials
from turnreg.gateway.gateway import GatewayConfig
from turnreg.registrar.config import Issued, Register, RegistrarConfig, RestSecret, TurnCredentials
from turnreg.server.allocation import Limits
from turnreg.server.config import TurnServerConfig

T = TypeVar("T")


def adapted(kind: type[T], section: object, **made: object) -> T:
    """Make a role's configuration. Fields in `made` are set to these values, and others are copied from the section by name."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in made]  # type: ignore[arg-type]
    return kind(**{name: getattr(section, name) for name in names if hasattr(section, name)}, **made)


def endpoints(listens: Iterable[Listen]) -> tuple[tuple[str, int], ...]:
    """Return addresses and ports in the engine's form."""
    return tuple((str(listen.address), listen.port) for listen in listens)


def imports(config: Config) -> Imports:
    """Return the imports of this network."""
    return Imports([section.as_rule() for section in config.imports])


def keys(config: Config) -> dict[str, SigningKey]:
    """Return the keys of all directions, in the order of the file."""
    return {
        key_id: SigningKey(id=key_id, secret=section.secret, from_network=section.source, to_network=section.to)
        for key_id, section in config.keys.items()
    }


def discovery_endpoints(config: Config) -> list[tuple[str, int]]:
    """Return the endpoints of discovery servers whose URLs contain an address, and of the etcd members behind our own server."""
    store = config.discovery_server.store if config.discovery_server is not None else ""
    members = parse_endpoints(store.removeprefix("etcd:")) if store.startswith("etcd:") else ()
    found = []
    for source in (*config.discovery, *members):
        parts = urlsplit(str(source))
        try:
            address = parse_address(parts.hostname or "")
        except BadAddress:
            continue
        found.append((str(address), parts.port or {"http": 80}.get(parts.scheme, 443)))
    return found


def relay_config(config: Config, section: RelaySection, guard: Iterable[tuple[str, int]]) -> RelayConfig:
    """Return the relay's configuration. `guard`: our own endpoints, which streams must not reach."""
    return adapted(
        RelayConfig,
        section,
        network=config.network,
        domain=config.domain,
        listen=endpoints(section.listen),
        imports=imports(config),
        policy=policy(section.rules),
        deliver=TargetList.parse(section.deliver),
        direct=TargetList.parse(section.direct),
        guard=tuple(guard),
        zone=section.zone or "",
    )


def dns_config(config: Config, section: DnsSection) -> DnsConfig:
    """Return the resolver's configuration."""
    return adapted(
        DnsConfig,
        section,
        network=config.network,
        domain=config.domain,
        listen=tuple((listen.address, listen.port) for listen in section.listen),
        imports=imports(config),
        search=search_domains() if section.search is None else section.search,
        upstream_ca=section.upstream_ca.pem if section.upstream_ca else None,
        cache=section.cache_config,
        cookie_secret=section.cookie_bytes,
    )


def gateway_config(config: Config, section: GatewaySection, guard: Iterable[tuple[str, int]]) -> GatewayConfig:
    """Return the gateway's configuration. `guard`: our own endpoints, which streams must not reach."""
    return adapted(
        GatewayConfig,
        section,
        network=config.network,
        domain=config.domain,
        allow=TargetList.parse(section.allow),
        policy=policy(section.rules),
        activate=tuple(rule.as_rule() for rule in section.activate),
        listen=endpoints(section.listen),
        guard=tuple(guard),
    )


def discovery_names(config: Config) -> list[tuple[str, int]]:
    """Return the endpoints of discovery servers whose URLs contain a name."""
    places = [urlsplit(url) for url in config.discovery_urls]
    found = [(parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)) for parts in places]
    return [place for place in found if not _is_address(place[0])]


def registrar_config(
    config: Config, section: GatewaySection, guard: Iterable[tuple[str, int]] = (), *, epoch: bytes
) -> RegistrarConfig:
    """Return the registrar's configuration. `guard`: our own endpoints, which cannot be other networks' TURN servers."""
    return adapted(
        RegistrarConfig,
        section,
        network=config.network,
        gateway=section.id,
        turn={network: _credentials(access) for network, access in section.turn.items()},
        ca={network: access.ca.pem for network, access in section.turn.items() if access.ca is not None},
        register=Register(section.register),
        proto=_protocols(epoch),
        allow={network: allow for network, access in section.turn.items() if (allow := _lifted(access.allow))},
        guard=tuple(guard),
        guard_names=tuple(discovery_names(config)),
    )


def turn_config(config: Config, section: TurnSection) -> TurnServerConfig:
    """Return the embedded TURN server's configuration."""
    relays = [str(address) for address in section.relay_address]
    port_min, port_max = section.ports
    return adapted(
        TurnServerConfig,
        section,
        listen=endpoints(section.listen),
        listen_tls=endpoints(section.tls.listen) if section.tls else (),
        listen_udp=endpoints(section.listen_udp),
        tls_cert=section.tls.cert if section.tls else None,
        tls_key=section.tls.key if section.tls else None,
        relay_addresses=tuple(relays),
        advertised=dict(zip(relays, map(str, section.advertise_relay_address), strict=False)),
        realm=section.realm or config.domain,
        port_min=port_min,
        port_max=port_max,
        users={name: secret.text for name, secret in section.users.items()},
        secrets=tuple(secret.text for secret in section.secret),
        allowed_peers=_lifted(section.allow_peers),
        limits=Limits(
            max_allocations_per_account=section.max_allocations_per_user,
            max_ports_per_account=max(1, (port_max - port_min + 1) * section.max_port_share_per_user // 100),
            max_connections_per_account=section.max_streams_per_user,
            buffer_bytes=section.buffer_bytes,
            max_bytes_per_second_per_account=section.max_bytes_per_second_per_user,
        ),
    )


def discovery_server_config(config: Config, section: DiscoveryServerSection) -> DiscoveryServerConfig:
    """Return the discovery server's configuration."""
    etcd, tls = section.etcd, section.tls
    return adapted(
        DiscoveryServerConfig,
        section,
        listen=endpoints(section.listen),
        etcd_prefix=etcd.prefix,
        etcd_ca=etcd.ca,
        etcd_cert=etcd.cert,
        etcd_key=etcd.key,
        etcd_username=etcd.username,
        etcd_password=etcd.password.text if etcd.password else None,
        tls_cert=tls.cert if tls else None,
        tls_key=tls.key if tls else None,
        tls_client_ca=tls.client_ca if tls else None,
        tokens_file=section.tokens.file if section.tokens else None,
        turn_secrets={network: secret.text for network, secret in section.turn_secrets.items()},
        allow_addresses=_lifted(section.allow_addresses),
        insecure=config.insecure,
    )


def publisher_config(config: Config, section: PublisherSection) -> PublisherConfig:
    """Return the publisher's configuration."""
    return adapted(PublisherConfig, section, network=config.network, token_file=section.token, ca_file=section.ca)


def turn_spec(section: TurnSection, listening: tuple[str, int], *, tls: bool = False) -> TurnSpec:
    """Return the record of the embedded TURN server. `listening`: its address and port."""
    address = parse_address(listening[0])
    relays = section.advertise_relay_address or section.relay_address
    reached = next((relay for relay in relays if relay.version == address.version), relays[0])
    if not address.is_unspecified:
        reached = address
    scheme = "turns" if tls else "turn"
    return TurnSpec(
        url=section.advertise or f"{scheme}:{format_endpoint(reached, listening[1])}?transport=tcp",
        relay_addresses=[str(relay) for relay in relays],
        port_min=section.ports[0],
        port_max=section.ports[1],
        zone=section.zone or "",
    )


def gateway_spec(section: GatewaySection, listening: tuple[str, int], epoch: bytes) -> GatewaySpec:
    """Return the record of a gateway that relays may dial. `listening`: its address and port."""
    address = section.advertise or format_endpoint(parse_address(listening[0]), listening[1])
    proto = list(_protocols(epoch))
    return GatewaySpec(address=str(address), weight=section.weight, zone=section.zone or "", proto=proto)


def _protocols(epoch: bytes) -> tuple[str, ...]:
    """Return what a gateway of this version speaks."""
    return FRAMED, proto_of(epoch), heartbeat.PROTO, UNDERSCORES


def _credentials(access: TurnAccessSection) -> TurnCredentials:
    if access.issue:
        return Issued()
    if access.secret is not None:
        return RestSecret(secret=access.secret.text)
    assert access.username is not None
    assert access.password is not None
    return Credentials(username=access.username, password=access.password.text)


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except BadAddress:
        return False
    return True


def _lifted(cidrs: Iterable[Network]) -> TargetList | None:
    """Return ranges that are allowed although they are refused by default; None: none."""
    return TargetList.parse(map(str, cidrs)) or None
