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
    """What the ids of its records begin with. Publishers of one cluster share it, those of two clusters must not: each
    takes away what stands under its own and is not exported any more."""

    api: str | None = None
    """URL of the Kubernetes API; by default from the pod's environment."""

    token_file: Path | None = None
    """Read again when it changes; by default the pod's service account token."""

    ca_file: Path | None = None
    namespaces: tuple[str, ...] = ()
    """Namespaces to publish; by default all, which needs the right to list and watch cluster-wide."""

    cluster_domain: str = DEFAULT_CLUSTER_DOMAIN

    page: int = PAGE
    """Objects that a list asks for at once."""

    watch_s: int = WATCH_S
    """How long the server is asked to keep a watch open, in seconds."""

    def resolved(self, environment: dict[str, str] | None = None) -> "PublisherConfig":
        """Fill in the defaults from the pod's environment. Raises ValueError outside of a pod."""
        if self.api is not None:
            return self
        found = os.environ if environment is None else environment
        host, port = found.get("KUBERNETES_SERVICE_HOST"), found.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ValueError("expected publisher.api, since this is no pod: KUBERNETES_SERVICE_HOST is not set")
        return replace(
            self,
            api=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
            token_file=self.token_file or SERVICE_ACCOUNT / "token",
            ca_file=self.ca_file or SERVICE_ACCOUNT / "ca.crt",
        )
