"""Configuration of the publisher."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from discovery.publisher.kubernetes import PAGE, WATCH_S

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DEFAULT_CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherConfig:
    """Configuration of the publisher."""

    network: str
    id: str = "k8s"
    """Prefix of the ids of its records. Publishers of one cluster must share it, and publishers of different clusters must not:
    each publisher deletes records with its prefix that its cluster does not export."""

    api: str | None = None
    """URL of the Kubernetes API; the default comes from the pod's environment."""

    token_file: Path | None = None
    """File with the token, read again when it changes; by default the pod's service account token."""

    ca_file: Path | None = None
    """CA that verifies the API server; by default the one of the pod's service account, if `api` is not set."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to publish. The default is all, which needs the right to list and watch in the whole cluster."""

    cluster_domain: str = DEFAULT_CLUSTER_DOMAIN
    """Domain of the names of the cluster's services."""

    service_exports: bool = False
    """Whether a ServiceExport exports the Service of its name."""

    clusterset_domain: str | None = None
    """Domain in which exported Services have a second name."""

    page: int = PAGE
    """Objects in one request of a list."""

    watch_s: int = WATCH_S
    """Seconds for which the API server is asked to keep a watch open."""

    def resolved(self, environment: dict[str, str] | None = None) -> "PublisherConfig":
        """Fill in the defaults from the pod's environment. Raises ValueError outside of a pod."""
        if self.api is not None:
            return self
        found = os.environ if environment is None else environment
        host, port = found.get("KUBERNETES_SERVICE_HOST"), found.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ValueError("expected publisher.api, since this is not a pod: KUBERNETES_SERVICE_HOST is not set")
        return replace(
            self,
            api=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
            token_file=self.token_file or SERVICE_ACCOUNT / "token",
            ca_file=self.ca_file or SERVICE_ACCOUNT / "ca.crt",
        )
