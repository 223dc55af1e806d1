"""A Discovery for tests of roles: a mesh that the test sets."""

from collections.abc import Callable

from discovery.client.contract import DiscoveryError, IssuedCredentials, Subscribers
from discovery.model.mesh import AnyRecord, Deletion, Kind, Mesh, Record, Spec


def record(kind: Kind, network: str, id: str, spec: Spec) -> AnyRecord:  # noqa: A002 - the record's own word
    """Make a record without a lease."""
    return Record(kind=kind, network=network, id=id, revision=1, lease=None, spec=spec)


class FixedDiscovery:
    """Implements discovery.client.contract.Discovery with a mesh that the test sets."""

    def __init__(self, *records: AnyRecord) -> None:
        self.mesh = Mesh.of(records)
        self.synced = True
        self._subscribers = Subscribers()

    def put(self, *records: AnyRecord) -> None:
        """Add or replace records and tell the subscribers."""
        self.mesh = self.mesh.apply(records, self.mesh.revision + 1)
        self._subscribers.notify(self.mesh)

    def remove(self, kind: Kind, network: str, id: str) -> None:  # noqa: A002 - the record's own word
        """Remove a record and tell the subscribers."""
        revision = self.mesh.revision + 1
        self.mesh = self.mesh.apply([Deletion((kind, network, id), revision)], revision)
        self._subscribers.notify(self.mesh)

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
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
        self.put(record(kind, network or "?", id, spec))

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        pass

    async def settled(self, timeout_s: float) -> bool:
        return True

    async def run(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        raise DiscoveryError("static", "a fixed mesh issues none")
