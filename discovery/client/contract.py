"""The interface of discovery for roles: the current mesh, and a way to publish records.

DiscoveryClient (servers), StaticDiscovery (a mesh.yaml) and MergedDiscovery (both) implement it; tests of roles have their own.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from discovery.model.mesh import Kind, Mesh, Spec

log = logging.getLogger(__name__)


class DiscoveryError(Exception):
    """Discovery cannot carry out a request: no server, no permission, or a static file instead of a server."""

    def __init__(self, code: str, detail: str) -> None:
        """`code` is the server's error code, `unavailable` or `static`; `detail` is a sentence for people."""
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCredentials:
    """Short-lived TURN credentials issued by a discovery server."""

    username: str
    password: str
    ttl_s: int
    urls: tuple[str, ...]
    """URLs of the TURN servers that accept them."""


class Discovery(Protocol):
    """The current mesh, and our own records, which are kept as wanted in the background."""

    @property
    def mesh(self) -> Mesh:
        """The current mesh. It is immutable, and replaced as a whole."""

    @property
    def synced(self) -> bool:
        """Whether a snapshot, live or from disk, has been loaded."""

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Call `callback` on the event loop with each new mesh. Returns a function that unsubscribes.

        It is not called with the current mesh.
        """

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
        """Keep this record published, in our network unless another is given. Idempotent; returns at once.

        A leased record is deleted when this process ends; others stay until somebody deletes them. With `if_absent` the record is
        written only if there is none, so the first writer wins. When that record is deleted, ours is tried again; and
        `withdraw` deletes the record only if it is still as we wrote it.
        """

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """Stop publishing a record, and delete it. Idempotent; returns at once."""

    async def settled(self, timeout_s: float) -> bool:
        """Wait until a server has acknowledged all our records. Returns False if that takes longer than `timeout_s`."""

    async def run(self) -> None:
        """Keep the mesh and our records up to date until cancelled."""

    async def close(self) -> None:
        """End the lease, which deletes our leased records. Takes a limited time. Call it after `run` has ended."""

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Request credentials for the TURN servers of a network. Raises DiscoveryError."""


class Subscribers:
    """Callbacks for each new mesh. If one raises, that is logged and the others are still called."""

    __slots__ = ("_callbacks",)

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[Mesh], None]] = {}

    def add(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Add a callback. Returns a function that removes it, and that may be called repeatedly."""
        token = object()
        self._callbacks[token] = callback

        def remove() -> None:
            self._callbacks.pop(token, None)

        return remove

    def notify(self, mesh: Mesh) -> None:
        """Call all callbacks, in the order in which they were added."""
        for callback in tuple(self._callbacks.values()):
            try:
                callback(mesh)
            except Exception:  # an error in one role must stop neither the other roles nor discovery
                log.exception("a subscriber to the mesh failed")
