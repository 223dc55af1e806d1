"""Publishers: they write the services of another registry as service records. The only one so far is for Kubernetes."""

from discovery.publisher.config import PublisherConfig
from discovery.publisher.role import Publisher

__all__ = ["Publisher", "PublisherConfig"]
