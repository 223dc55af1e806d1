"""The `publisher` section."""

from dataclasses import dataclass

from crossnet.config.types import Domain, ExistingFile, KubernetesUrl, NetworkId, RecordId

CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherSection:
    """What publishes a Kubernetes cluster's exported Services as service records of this network."""

    id: RecordId = "k8s"
    """What the ids of its records begin with; each cluster of a network has its own."""
    api: KubernetesUrl | None = None
    """URL of the API; by default that of the cluster that we are a pod of, with the pod's own token and authority."""
    token: ExistingFile | None = None
    """Read again as it is renewed."""
    ca: ExistingFile | None = None
    """The authority that signs the certificate of the API."""
    namespaces: tuple[NetworkId, ...] = ()
    """Only these; by default all."""
    cluster_domain: Domain = CLUSTER_DOMAIN
    """The domain of the cluster, in which its services have their names."""
