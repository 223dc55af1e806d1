"""The interface between a process and its roles: open, reconfigure, drain or hand over, close."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar

from prometheus_client import CollectorRegistry

from crossnet.app.readiness import Condition
from crossnet.config.sections import Config
from crossnet.handover import Inherited, Place
from discovery.api import ServerRefused
from discovery.client.contract import Discovery
from discovery.files.yaml_file import BadFile
from discovery.store import StoreError
from sniproxy.streams.stream_log import StreamLog

T = TypeVar("T")

FORGET_S = 2.0
"""Added to the TTL of our DNS answers, for clients' resolvers that round it up. Relays have seen a change in discovery by then,
too."""


class StartError(Exception):
    """A role cannot start; the text says which one and why."""


class Host(Protocol):
    """What a process offers to its roles."""

    config: Config
    """The current configuration."""
    registry: CollectorRegistry
    inherited: Inherited
    """The sockets of our predecessor."""
    handed_over: bool
    """Whether a successor has replaced this process."""

    @property
    def speaks_to_discovery(self) -> bool:
        """Whether there is a client of discovery."""

    @property
    def discovery(self) -> Discovery:
        """The client of discovery. Not available to roles that are opened before it."""

    def run(self, name: str, running: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in a task until the process ends. If it raises, the process ends."""

    def guard(self) -> list[tuple[str, int]]:
        """Return the addresses of this process's listeners so far, and of discovery servers: streams must not go there."""

    def has(self, role: str) -> bool:
        """Whether the process runs a role."""


class Role:
    """One role of a process. The methods here do nothing; a role overrides those that it needs.

    They are called in this order: `open`, `publish`, `predecessor_gone` after a handover; any number of `changes`; then `withdraw`
    or `hand_over`, `stop_accepting`, and when it is idle or its time is up, `give_back`.
    """

    name: ClassVar[str]
    """Its section in the file."""
    before_discovery: ClassVar[bool] = False
    """It is opened before the client of discovery, which may depend on it."""
    ledger: StreamLog | None = None
    """Its streams, if it carries any."""

    def __init__(self, host: Host) -> None:
        """Create a role that is not open."""
        self.host = host
        self.addresses: list[tuple[str, int]] = []
        """Where it listens, with the actual ports in place of 0."""

    async def begin(self, opening: Awaitable[T]) -> T:
        """Wait for a step of the start. Raises StartError for errors that an operator can fix."""
        return await beginning(self.name, opening)

    def listens(self, addresses: Iterable[tuple[str, int]]) -> None:
        """Set `addresses`."""
        self.addresses = list(addresses)

    @property
    def active(self) -> bool:
        """Whether it is listed as running."""
        return True

    async def open(self) -> None:
        """Bind, and start its tasks. Raises StartError."""

    def publish(self) -> None:
        """Write its records, unless a task of its own does that."""

    def predecessor_gone(self) -> None:
        """Called when our predecessor has stopped accepting."""

    @property
    def settled(self) -> bool:
        """Whether it has all that a successor needs before its predecessor may stop."""
        return True

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield functions that apply `new`, which differs from `old` only in live settings.

        All are collected before the first is called. A function that fails raises, and has changed nothing; Refused carries an
        explanation for the operator.
        """
        del old, new
        yield from ()

    def sockets(self) -> Iterator[tuple[Place, int]]:
        """Yield its listening sockets, for a successor."""
        yield from ()

    def stop_listening(self) -> None:
        """Stop accepting from the listening sockets, which a successor shares."""

    def withdraw(self) -> None:
        """Withdraw its records, so that clients and other networks look elsewhere."""

    def hand_over(self) -> None:
        """Leave its records to a successor, which has already written the same ones."""

    def comes_until(self, now: float) -> float:
        """Return until when, in the loop's time, clients may still use what they learned before `now`."""
        return now

    def stop_accepting(self) -> None:
        """Accept no new streams; open ones continue."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to wait for."""
        return True

    @property
    def open_streams(self) -> int:
        """Number of streams that would be cut if the process ended now."""
        return 0 if self.ledger is None else len(self.ledger)

    async def give_back(self) -> None:
        """Release what others hold for us, such as allocations."""

    def conditions(self) -> Iterator[Condition]:
        """Yield what must hold for the process to be ready."""
        yield from ()

    def status(self) -> dict[str, object]:
        """Return its part of the status page."""
        return {}


async def beginning(what: str, opening: Awaitable[T]) -> T:
    """Wait for a step of the start. Raises StartError, prefixed with `what`, for errors that an operator can fix."""
    try:
        return await opening
    except (OSError, ValueError, StoreError, ServerRefused, BadFile) as error:
        raise StartError(f"{what}: {error}") from error
