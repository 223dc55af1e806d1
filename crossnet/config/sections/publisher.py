"""The `publisher` section."""

from dataclasses import dataclass

from crossnet.config.types import Boolean, Domain, ExistingFile, KubernetesUrl, NetworkId, RecordId

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
    service_exports: Boolean = False
    """Export also Services with a ServiceExport of their name (multicluster.x-k8s.io/v1alpha1, KEP-1645). The cluster must have
    this kind, and the publisher the right to list and watch it, and to patch its status."""
    clusterset_domain: Domain | None = None
    """Exported Services have a second name in this domain, the same in all clusters, usually clusterset.local:
    orders.shop.svc.clusterset.local. Networks import these names like others."""
