"""The `publisher` section."""

from dataclasses import dataclass

from crossnet.config.types import Domain, ExistingFile, KubernetesUrl, NetworkId, RecordId

CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherSection:
    """Publishes a Kubernetes cluster's exported Services as service records of this network."""

    id: RecordId = "k8s"
    """Prefix of its records' ids; each cluster of a network needs its own."""
    api: KubernetesUrl | None = None
    """URL of the API; by default that of the cluster that the process is a pod of, with the pod's own token and CA."""
    token: ExistingFile | None = None
    """File with the bearer token, reloaded when it is renewed."""
    ca: ExistingFile | None = None
    """CA for the API's certificate."""
    namespaces: tuple[NetworkId, ...] = ()
    """Only Services in these namespaces; by default in all."""
    cluster_domain: Domain = CLUSTER_DOMAIN
    """The cluster's domain, in which its services have their names."""
