"""Creates the process's client of discovery: for servers, a mesh file, or both."""

from prometheus_client import CollectorRegistry

from crossnet.config.sections import Config
from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.client.contract import Discovery
from discovery.client.merged import MergedDiscovery
from discovery.client.mesh_file import StaticDiscovery


async def open_discovery(config: Config, registry: CollectorRegistry) -> Discovery:
    """Create the process's client of discovery."""
    file = None
    if config.static_mesh is not None:
        file = StaticDiscovery(config.static_mesh, network=config.network, allowed=config.dialled)
        if not config.discovery_urls:
            return file
    client_config = DiscoveryClientConfig(
        urls=config.discovery_urls,
        network=config.network,
        token=config.token.text if config.token else None,
        ca_file=config.discovery_tls.ca if config.discovery_tls else None,
        cert_file=config.discovery_tls.cert if config.discovery_tls else None,
        key_file=config.discovery_tls.key if config.discovery_tls else None,
        insecure=config.insecure,
        snapshot_file=config.snapshot,
    )
    client = DiscoveryClient(client_config, registry=registry)
    return client if file is None else MergedDiscovery(client, file)
