"""The discovery server: records, leases and watches over HTTP.

`discovery/API.md` explains the API, `openapi.yaml` in this directory is its reference. Tests check both against the server.
"""

from discovery.api.config import DiscoveryServerConfig, ServerRefused, start_refusals
from discovery.api.messages import EPOCH_HEADER
from discovery.api.server import DiscoveryServer

__all__ = ["EPOCH_HEADER", "DiscoveryServer", "DiscoveryServerConfig", "ServerRefused", "start_refusals"]
