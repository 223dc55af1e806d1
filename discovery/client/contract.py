"""What a role is given of discovery: the current mesh, and a way to say what is true of itself.

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
        """Say why: the server's error code, or `unavailable` or `static`; and a sentence for people."""
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

        A leased record goes when we do; another stays until somebody deletes it. With `if_absent` it is written only
        where there is none: the first writer's stands, whoever that is, and the mesh tells all what it says. When it is
        deleted, ours is tried again. Withdrawing it deletes it only if it is as we wrote it.
        """

    def withdraw(self, kind: Kind, id: str, *, network: str | None = None) -> None:  # noqa: A002
        """No longer want a record that `publish` named. Idempotent; returns at once."""

    async def settled(self, timeout_s: float) -> bool:
        """Wait until the server has acknowledged all desired state; False when that takes longer."""

    async def run(self) -> None:
        """Keep the view and the desired state true until cancelled."""

    async def close(self) -> None:
        """Withdraw what was published and end the lease; bounded in time, call it after `run` has ended."""

    async def turn_credentials(self, network: str) -> IssuedCredentials:
        """Have the server issue credentials for that network's TURN servers. Raises DiscoveryError."""


class Subscribers:
    """Callbacks that want each new mesh. One that fails is logged and hurts no other."""

    __slots__ = ("_callbacks",)

    def __init__(self) -> None:
        """Begin with none."""
        self._callbacks: dict[object, Callable[[Mesh], None]] = {}

    def add(self, callback: Callable[[Mesh], None]) -> Callable[[], None]:
        """Add one; calling what is returned, once or more often, takes it away."""
        token = object()
        self._callbacks[token] = callback

        def remove() -> None:
            self._callbacks.pop(token, None)

        return remove

    def tell(self, mesh: Mesh) -> None:
        """Call them all, in the order in which they came."""
        for callback in tuple(self._callbacks.values()):
            try:
                callback(mesh)
            except Exception:  # a role's fault must stop neither the other roles nor discovery
                log.exception("a subscriber to the mesh failed")
