"""Clients, clocks and stores for the tests of clients."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from discovery.client.client import DiscoveryClient
from discovery.client.config import DiscoveryClientConfig
from discovery.model.mesh import RelaySpec
from discovery.store import Lease, SqliteStore
from tests.discovery.waiting import DEADLINE_S

RELAY = RelaySpec(addresses=["10.0.0.9"], ports=[443])
OTHER = RelaySpec(addresses=["10.0.0.10"], ports=[443])


def client_of(*at: Any, network: str = "a", **settings: Any) -> DiscoveryClient:
    return client_at(*(server.url for server in at), network=network, **settings)


def client_at(
    *urls: str,
    network: str = "a",
    registry: CollectorRegistry | None = None,
    wall_clock: Callable[[], float] = time.time,
    **settings: Any,
) -> DiscoveryClient:
    config = DiscoveryClientConfig(urls=urls, network=network, **settings)
    return DiscoveryClient(config, registry=registry, wall_clock=wall_clock)


class WallClock:
    """The real time of day, plus an offset."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


class CountingStore(SqliteStore):
    """A store that counts renewals of leases."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.renewed = asyncio.Semaphore(0)

    async def renew(self, lease_id: str) -> Lease:
        self.renewed.release()
        return await super().renew(lease_id)

    async def renewals(self, count: int) -> None:
        """Wait for this many more renewals."""
        self.renewed = asyncio.Semaphore(0)
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(count):
                await self.renewed.acquire()
