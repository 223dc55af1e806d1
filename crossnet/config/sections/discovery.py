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
    """The server's certificate."""

    cert: ExistingFile
    """The certificate chain."""
    key: ExistingFile
    """Its key."""
    client_ca: ExistingFile | None = None
    """CA for client certificates, which entries of the tokens file can name instead of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSection:
    """Which token may write which records."""

    file: ExistingFile
    """A YAML file, reloaded when it changes; `crossnet token new` prints entries for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSection:
    """Connection to the etcd cluster that is the store."""

    prefix: KeyPrefix = DEFAULT_PREFIX
    """Prefix of all keys, so that several meshes can share a cluster."""
    ca: ExistingFile | None = None
    """CA for the members' certificates; by default the system's CAs."""
    cert: ExistingFile | None = None
    """Client certificate, for a cluster that requires one."""
    key: ExistingFile | None = None
    """Its key."""

    username: Text | None = None
    """User name, for a cluster with authentication."""
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
    """Addresses to listen on."""
    store: Store = "memory"
    """`memory`, `sqlite:PATH`, or `etcd:` and the URLs of its members, nearest first."""
    etcd: EtcdSection = EtcdSection()
    """Connection to the cluster, if the store is etcd."""
    tls: ServerTlsSection | None = None
    """Its certificate. Without it, the server uses plain HTTP."""
    tokens: TokensSection | None = None
    """Who may write what. Without it, everybody may write everything."""
    turn_secrets: Live[dict[NetworkId, SecretFile]] = dataclasses.field(default_factory=dict)
    """For each network, the shared secret of its TURN servers, from which credentials are issued."""
    requests_per_s: Live[Count] = dataclasses.field(default=200, metadata=key("requests_per_second"))
    """Sustained request rate of each network; bursts may be far larger."""
    max_records_per_network: Live[Count] = 20_000
    """Limit of one network's records."""
    max_watchers: Live[Count] = 2000
    """Limit of concurrent watches."""
    max_watchers_per_network: Live[Count] = 1000
    """Limit of concurrent watches of one network."""
    max_connections: Count = 8192
    """Limit of concurrent connections, and never more than a quarter of the process's descriptors."""
    max_connections_per_address: Count = 2048
    """Limit of concurrent connections from one address."""
    turn_credential_ttl_s: Live[WholeSeconds] = 3600
    """Lifetime of issued credentials; gateways fetch new ones after two thirds of it."""
    allow_addresses: Live[tuple[Cidr, ...]] = ()
    """Ranges that are allowed in records although they are refused by default, such as 127.0.0.0/8 for trying it on one machine."""

    @rule("tokens")
    def _tokens_file(self) -> Iterator[Fault]:
        if self.tokens is not None:
            try:
                Tokens.load(self.tokens.file)
            except BadFile as error:
                for fault in error.faults:
                    yield Fault(".tokens.file", f"a tokens file ({fault.path}: expected {fault.expected})", fault.got)
