"""The interface of discovery to a role: the current mesh, and a way to publish records of its own.

DiscoveryClient (a server) and StaticDiscovery (a mesh.yaml) both fulfil it; tests of roles bring their own.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from discovery.model.mesh import Kind, Mesh, Spec

log = logging.getLogger(__name__)


class DiscoveryError(Exception):
    """Discovery cannot do what was asked: no server, no permission, or a static file in place of a server."""

    def __init__(self, code: str, detail: str) -> None:
        """`code` is the server's error code, `unavailable` or `static`; `detail` a sentence for people."""
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCredentials:
    """Short-lived TURN credentials that the discovery server made."""

    username: str
    password: str
    ttl_s: int
    urls: tuple[str, ...]
    """The TURN servers that they are for."""


class Discovery(Protocol):
    """The current mesh, and desired state of our own that is kept true in the background."""

    @property
    def mesh(self) -> Mesh:
        """The current view: swapped whole, never None."""

    @property
    def synced(self) -> bool:
        """Whether a snapshot, live or from disk, has been loaded."""

    def subscribe(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Have `callback` called on the loop with each new mesh; what is returned ends that.

        It is not called with the mesh that is there already.
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
        """Want this record to be there, in our network unless another is named. Idempotent; returns at once.

        A leased record is deleted when we end; another one stays until somebody deletes it. With `if_absent` it is written
        only if there is none: the first writer's record stands. When that is deleted, ours is tried again. Withdrawing
        deletes it only if it is still as we wrote it.
        """

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """Take back what `publish` asked for. Idempotent; returns at once."""

    async def settled(self, timeout_s: float) -> bool:
        """Wait until the server has acknowledged all desired state; False when that takes longer."""

    async def run(self) -> None:
        """Keep the view and the desired state true until cancelled."""

    async def close(self) -> None:
        """Withdraw what was published and end the lease; bounded in time, call it after `run` has ended."""

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Have the server issue credentials for that network's TURN servers. Raises DiscoveryError."""


class Subscribers:
    """Callbacks for each new mesh. If one fails, that is logged and the others are still called."""

    __slots__ = ("_callbacks",)

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[Mesh], None]] = {}

    def add(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Add a callback. Call the result, once or more often, to remove it."""
        token = object()
        self._callbacks[token] = callback

        def remove() -> None:
            self._callbacks.pop(token, None)

        return remove

    def notify(self, mesh: Mesh) -> None:
        """Call them all, in the order in which they were added."""
        for callback in tuple(self._callbacks.values()):
            try:
                callback(mesh)
            except Exception:  # a role's fault must stop neither the other roles nor discovery
                log.exception("a subscriber to the mesh failed")
