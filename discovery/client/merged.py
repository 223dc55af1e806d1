"""A mesh.yaml in addition to discovery servers: one view of both, in which the file wins.

A record of the file replaces the servers' record with the same key, and a service of the file replaces all services with the
same name in its network. Records that roles publish go to the servers.
"""

import asyncio
from collections.abc import Callable

from discovery.client.client import DiscoveryClient
from discovery.client.contract import Discovery, IssuedCredentials, Subscribers
from discovery.client.mesh_file import StaticDiscovery
from discovery.model.mesh import Deletion, Kind, Mesh, Spec


class MergedDiscovery(Discovery):
    """Discovery by servers and a file."""

    def __init__(self, client: DiscoveryClient, file: StaticDiscovery) -> None:
        """Neither may be running yet: `run` runs both."""
        self._client = client
        self._file = file
        self._subscribers = Subscribers()
        self._mesh = merged(client.mesh, file.mesh)
        client.subscribe(self._changed)
        file.subscribe(self._changed)

    @property
    def mesh(self) -> Mesh:
        """The servers' mesh, overlaid with the file's records."""
        return self._mesh

    @property
    def synced(self) -> bool:
        """Whether the servers' view has been loaded; the file was read at the start."""
        return self._client.synced

    @property
    def connected(self) -> bool:
        """Whether the servers' view is live."""
        return self._client.connected

    @property
    def age_s(self) -> float | None:
        """Seconds since a server last confirmed the view; None before there is one."""
        return self._client.age_s

    @property
    def troubles(self) -> tuple[tuple[str, str], ...]:
        """Reasons why our records are not at the servers as wanted."""
        return self._client.troubles

    @property
    def rivals(self) -> tuple[str, ...]:
        """Our records that another process has recently overwritten."""
        return self._client.rivals

    @property
    def clock_ahead_s(self) -> float | None:
        """Seconds by which the server's clock is ahead of ours; None before the first answer."""
        return self._client.clock_ahead_s

    def expect_successor(self, expected: bool) -> None:
        """Set whether the process that replaces this one may overwrite our records."""
        self._client.expect_successor(expected)

    def use_token(self, token: str | None) -> None:
        """Use this token for the servers from the next request on."""
        self._client.use_token(token)

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Call `callback` with each new mesh. Returns a function that unsubscribes."""
        return self._subscribers.add(callback)

    def publish(
        self,
        kind: Kind,
        id: str,  # noqa: A002
        spec: Spec,
        *,
        network: str | None = None,
        leased: bool = True,
        if_absent: bool = False,
    ) -> None:
        """Keep this record published at the servers."""
        self._client.publish(kind, id, spec, network=network, leased=leased, if_absent=if_absent)

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """Stop publishing a record, and delete it."""
        self._client.withdraw(kind, id, network=network)

    async def settled(self, timeout_s: float) -> bool:
        """Wait until a server has acknowledged all our records. Returns False if that takes longer than `timeout_s`."""
        return await self._client.settled(timeout_s)

    async def run(self) -> None:
        """Keep both views and our records up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._client.run(), name="discovery-client")
            group.create_task(self._file.run(), name="discovery-file")

    async def close(self) -> None:
        """End the lease, which deletes our leased records."""
        await self._client.close()

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Request credentials for the TURN servers of a network. Raises DiscoveryError."""
        return await self._client.turn_credentials(network)

    def _changed(self, _: Mesh) -> None:
        self._mesh = merged(self._client.mesh, self._file.mesh)
        self._subscribers.notify(self._mesh)


def merged(servers: Mesh, file: Mesh) -> Mesh:
    """Return the servers' mesh, overlaid with the records of a file."""
    hidden = [
        Deletion(other.key, 0)
        for record in file
        if record.kind is Kind.SERVICE
        for other in servers.services(record.network)
        if other.spec.name == record.spec.name
    ]
    # The file's revision counts how often it was read. The merged mesh has the servers' revision.
    return servers.apply([*hidden, *file]).at(servers.revision)
