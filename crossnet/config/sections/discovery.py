"""The `discovery_server` section."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from crossnet.config.schema import Live, OneOrMore, key, rule
from crossnet.config.types import (
    Cidr,
    Count,
    ExistingFile,
    KeyPrefix,
    ListenAddress,
    NetworkId,
    SecretFile,
    Store,
    Text,
    WholeSeconds,
)
from discovery.api.tokens import Tokens
from discovery.files.yaml_file import BadFile
from discovery.model.validation import Fault
from discovery.store.etcdapi import DEFAULT_PREFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTlsSection:
    """The certificate that a server of ours shows."""

    cert: ExistingFile
    """The certificate chain."""
    key: ExistingFile
    """Its key."""
    client_ca: ExistingFile | None = None
    """Verifies client certificates, which entries of the tokens file can name in place of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSection:
    """The file that says which token may write what."""

    file: ExistingFile
    """A YAML file, read again when it changes; `crossnet token new` prints its entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSection:
    """How an etcd cluster is spoken to that is the store."""

    prefix: KeyPrefix = DEFAULT_PREFIX
    """What keys begin with; several meshes can share a cluster."""
    ca: ExistingFile | None = None
    """Verifies the members; the system's authorities by default."""
    cert: ExistingFile | None = None
    """The client certificate that we show to a cluster that asks for one."""
    key: ExistingFile | None = None
    """Its key."""

    username: Text | None = None
    """Who we are to a cluster with authentication enabled."""
    password: SecretFile | None = None
    """The password of `username`."""

    @rule("cert", "key")
    def _pair(self) -> Iterator[Fault]:
        if (self.cert is None) != (self.key is None):
            yield Fault(".cert" if self.cert is None else ".key", "cert and key, or neither", "one of them")

    @rule("username", "password")
    def _user(self) -> Iterator[Fault]:
        if (self.username is None) != (self.password is None):
            lacking = ".username" if self.username is None else ".password"
            yield Fault(lacking, "username and password, or neither", "one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryServerSection:
    """The discovery server, for all networks."""

    listen: Annotated[tuple[ListenAddress, ...], OneOrMore()]
    """Where it is asked."""
    store: Store = "memory"
    """`memory`, `sqlite:PATH`, or `etcd:` and the URLs of its members, the nearest first."""
    etcd: EtcdSection = EtcdSection()
    """How the cluster is reached, where the store is etcd."""
    tls: ServerTlsSection | None = None
    """Its certificate. Without it, it is asked by http."""
    tokens: TokensSection | None = None
    """Who may write what. Without it everybody may write everything."""
    turn_secrets: Live[dict[NetworkId, SecretFile]] = dataclasses.field(default_factory=dict)
    """For each network the secret of its TURN servers, to issue credentials from."""
    requests_per_s: Live[Count] = dataclasses.field(default=200, metadata=key("requests_per_second"))
    """What each network may ask in the long run; far more at once."""
    max_records_per_network: Live[Count] = 20_000
    """Records of one network."""
    max_watchers: Live[Count] = 2000
    """Watches at once."""
    max_watchers_per_network: Live[Count] = 1000
    """Watches at once of one network."""
    max_connections: Count = 8192
    """In all; a quarter of the process's descriptors at most."""
    max_connections_per_address: Count = 2048
    """Connections at once from one address."""
    turn_credential_ttl_s: Live[WholeSeconds] = 3600
    """How long issued credentials live; gateways get new ones after two thirds of it."""
    allow_addresses: Live[tuple[Cidr, ...]] = ()
    """Addresses in ranges that are refused in records otherwise, such as 127.0.0.0/8 for a try on one machine."""

    @rule("tokens")
    def _tokens_file(self) -> Iterator[Fault]:
        if self.tokens is not None:
            try:
                Tokens.load(self.tokens.file)
            except BadFile as error:
                for fault in error.faults:
                    yield Fault(".tokens.file", f"a tokens file ({fault.path}: expected {fault.expected})", fault.got)
