"""Clients of servers that a test runs."""

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry

from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.model.mesh import RelaySpec

RELAY = RelaySpec(addresses=["10.0.0.9"], ports=[443])
OTHER = RelaySpec(addresses=["10.0.0.10"], ports=[443])


def client_of(*at: Any, network: str = "a", **settings: Any) -> DiscoveryClient:
    return client_at(*(server.url for server in at), network=network, **settings)


def client_at(
    *urls: str, network: str = "a", registry: CollectorRegistry | None = None, **settings: Any
) -> DiscoveryClient:
    return DiscoveryClient(DiscoveryClientConfig(urls=urls, network=network, **settings), registry=registry)


async def gone(at: Any, *key: Any) -> None:
    async with asyncio.timeout(5):
        while await at.store.get(key) is not None:
            await asyncio.sleep(0.01)
