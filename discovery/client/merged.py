"""A mesh.yaml beside discovery servers: both views in one, where what the file says wins.

A record of the file takes the place of the servers' under its key, and a service of the file that of every other service
of its name in its network. What a role publishes goes to the servers.
"""

import asyncio
from collections.abc import Callable

from discovery.client.client import DiscoveryClient
from discovery.client.contract import Discovery, IssuedCredentials, Subscribers
from discovery.client.mesh_file import StaticDiscovery
from discovery.model.mesh import Deletion, Kind, Mesh, Spec


class MergedDiscovery(Discovery):
    """Discovery by way of servers and a file."""

    def __init__(self, client: DiscoveryClient, file: StaticDiscovery) -> None:
        """Take both; neither runs yet."""
        self._client = client
        self._file = file
        self._subscribers = Subscribers()
        self._mesh = merged(client.mesh, file.mesh)
        client.subscribe(self._changed)
        file.subscribe(self._changed)

    @property
    def mesh(self) -> Mesh:
        """The servers' view with the file's records over it."""
        return self._mesh

    @property
    def synced(self) -> bool:
        """Whether the servers' view has been loaded; the file's was at the start."""
        return self._client.synced

    @property
    def connected(self) -> bool:
        """Whether the servers' view is live."""
        return self._client.connected

    @property
    def age_s(self) -> float | None:
        """For how long the servers' view has not been confirmed."""
        return self._client.age_s

    @property
    def troubles(self) -> tuple[tuple[str, str], ...]:
        """What the servers refuse us."""
        return self._client.troubles

    @property
    def rivals(self) -> tuple[str, ...]:
        """Records of ours that another process has written."""
        return self._client.rivals

    @property
    def clock_ahead_s(self) -> float | None:
        """By how much the servers' clock is ahead of ours."""
        return self._client.clock_ahead_s

    def expect_successor(self, expected: bool) -> None:
        """Have what is written in place of our records be as it should."""
        self._client.expect_successor(expected)

    def use_token(self, token: str | None) -> None:
        """Show the servers this token from the next request on."""
        self._client.use_token(token)

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Have `callback` called with each new mesh."""
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
        """Want this record to be there, at the servers."""
        self._client.publish(kind, id, spec, network=network, leased=leased, if_absent=if_absent)

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """No longer want a record."""
        self._client.withdraw(kind, id, network=network)

    async def settled(self, timeout_s: float) -> bool:
        """Wait until a server has acknowledged all desired state."""
        return await self._client.settled(timeout_s)

    async def run(self) -> None:
        """Keep both true until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._client.run(), name="discovery-client")
            group.create_task(self._file.run(), name="discovery-file")

    async def close(self) -> None:
        """Withdraw what was published."""
        await self._client.close()

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Have a server issue credentials."""
        return await self._client.turn_credentials(network)

    def _changed(self, _: Mesh) -> None:
        self._mesh = merged(self._client.mesh, self._file.mesh)
        self._subscribers.notify(self._mesh)


def merged(servers: Mesh, file: Mesh) -> Mesh:
    """Lay the records of a file over the servers'."""
    hidden = [
        Deletion(other.key, 0)
        for record in file
        if record.kind is Kind.SERVICE
        for other in servers.services(record.network)
        if other.spec.name == record.spec.name
    ]
    # The file's revisions count the times that it was read; those of the mesh are the servers'.
    return servers.apply([*hidden, *file]).at(servers.revision)
