"""Publishers: what a network's own registry of services knows, as service records. Kubernetes is the one there is."""

from discovery.publisher.config import PublisherConfig
from discovery.publisher.role import Publisher

__all__ = ["Publisher", "PublisherConfig"]
