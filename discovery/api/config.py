"""Configuration of a discovery server, and the reasons for which it refuses one."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from discovery.http.listener import ListenerLimits
from discovery.model.addresses import TargetList
from discovery.model.validation import shown
from discovery.store import EtcdAccess, EtcdStore, MemoryStore, SqliteStore, Store, StoreError
from discovery.store.etcdapi import DEFAULT_PREFIX, parse_endpoints

MAX_BODY = 1024 * 1024
"""The largest service, with 1000 endpoints on each port, has some 25 kB a port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryServerConfig:
    """Configuration of a discovery server."""

    listen: tuple[tuple[str, int], ...]
    """IP addresses and ports; port 0 means any free port."""

    store: str = "memory"
    """`memory`, `sqlite:PATH`, or `etcd:` and a comma-separated list of URLs."""

    etcd_prefix: str = DEFAULT_PREFIX
    """Prefix of our keys in etcd, so that several meshes can share a cluster."""

    etcd_ca: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    """CA that verifies the members of etcd, and our client certificate."""

    etcd_username: str | None = None
    etcd_password: str | None = field(default=None, repr=False)
    """User of an etcd with authentication enabled."""

    tls_cert: Path | None = None
    tls_key: Path | None = None
    """Key of the certificate; None if both are in one file."""

    tls_client_ca: Path | None = None
    """CA that verifies client certificates, which can be used instead of tokens."""

    tokens_file: Path | None = None
    """Without one every client may do everything. That is allowed only on loopback or with `insecure`."""

    turn_secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """REST secret of the TURN servers of each network, from which credentials are made."""

    turn_credential_ttl_s: int = 3600
    """Lifetime of issued credentials. Gateways get new ones after two thirds of it. The embedded server accepts them for an
    existing allocation. coturn, which checks the expiry only at Allocate, refuses them (441), so gateways first make another
    allocation there."""

    allow_addresses: TargetList | None = None
    """Addresses that records may contain although they are in a refused range such as loopback; for tests and the lab."""

    insecure: bool = False
    """Allow to serve other hosts without TLS or without tokens."""

    max_body_bytes: int = MAX_BODY
    max_records_per_network: int = 20_000
    max_leases_per_token: int = 1000
    max_watchers: int = 2000
    max_watchers_per_network: int = 1000
    max_connections: int = 8192
    max_connections_per_address: int = 2048
    """A network behind one address has two connections for each process. Both limits are lowered if the process may not open
    enough file descriptors."""

    requests_per_s: float = 200.0
    """Average rate of requests of one network: enough for six hundred clients that renew their leases."""

    request_burst: int = 5000
    """Burst of requests of one network: a gateway that registers in a thousand networks writes as many records at its start."""

    credentials_per_s: float = 5.0
    """Average rate of TURN credentials of one network: each is a new secret and a line in the log."""

    credentials_burst: int = 1000


class ServerRefused(Exception):
    """The configuration would serve other hosts without TLS or tokens; `reasons` has a sentence for each."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)


def listener_limits(config: DiscoveryServerConfig) -> ListenerLimits:
    """Return the listener's limits. It lets larger requests through than are accepted, so that clients can read the 413."""
    return ListenerLimits(
        connections=config.max_connections,
        connections_per_address=config.max_connections_per_address,
        request_bytes=config.max_body_bytes + 256 * 1024,
        files_share=4,
    )


def start_refusals(config: DiscoveryServerConfig) -> list[str]:
    """Return the reasons why a server must not start with this configuration. `crossnet check` uses it too."""
    public = [f"{host}:{port}" for host, port in config.listen if not ip_address(host).is_loopback]
    if config.insecure or not public:
        return []
    reasons = []
    if config.tokens_file is None:
        reasons.append(f"no tokens, but listens on {', '.join(public)}: anybody there could write any record")
    if config.tls_cert is None:
        reasons.append(f"no tls, but listens on {', '.join(public)}: tokens would be sent in clear text")
    return [f"{reason}; listen on loopback only, or set insecure: true" for reason in reasons]


def make_store(config: DiscoveryServerConfig) -> Store:
    """Make the configured store. Raises StoreError."""
    scheme, colon, place = config.store.partition(":")
    if config.store == "memory":
        return MemoryStore()
    if scheme == "sqlite" and colon and place:
        return SqliteStore(Path(place))
    if scheme == "etcd" and colon:
        try:
            access = EtcdAccess(
                endpoints=parse_endpoints(place),
                prefix=config.etcd_prefix,
                ca=config.etcd_ca,
                cert=config.etcd_cert,
                key=config.etcd_key,
                username=config.etcd_username,
                password=config.etcd_password,
            )
            return EtcdStore(access)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise StoreError(f"etcd: {error}") from error
    raise StoreError(f"expected memory, sqlite:PATH or etcd:URL,…, got {shown(config.store)}")


def tls_context(config: DiscoveryServerConfig) -> ssl.SSLContext | None:
    """Make the TLS context of a server; None without a certificate. Raises OSError, ssl.SSLError."""
    if config.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(config.tls_cert, config.tls_key)
    if config.tls_client_ca is not None:
        context.load_verify_locations(config.tls_client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL  # a client without a certificate needs a token
    return context
