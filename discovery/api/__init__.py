"""The discovery server: records, leases and watches over HTTP.

`discovery/API.md` explains the API, `openapi.yaml` beside this file is its reference. Tests hold both against the server.
"""

from discovery.api.config import DiscoveryServerConfig, ServerRefused, start_refusals
from discovery.api.messages import EPOCH_HEADER
from discovery.api.server import DiscoveryServer

__all__ = ["EPOCH_HEADER", "DiscoveryServer", "DiscoveryServerConfig", "ServerRefused", "start_refusals"]
