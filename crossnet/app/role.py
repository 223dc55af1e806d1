"""What a role is to the process that runs it: opened, changed while it runs, drained or handed over, ended."""

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
"""On top of the TTL of our DNS answers, for resolvers on the client's side that round it up. Relays have heard of a change in
discovery by then, too."""


class StartError(Exception):
    """A role cannot start; the text says which one and why."""


class Host(Protocol):
    """What a process gives its roles."""

    config: Config
    """That of now."""
    registry: CollectorRegistry
    inherited: Inherited
    """The sockets of the process that we come after."""
    handed_over: bool
    """Whether another process has taken our place."""

    @property
    def speaks_to_discovery(self) -> bool:
        """Whether there is a client of discovery."""

    @property
    def discovery(self) -> Discovery:
        """The client of discovery. Not for roles that are opened before it."""

    def run(self, name: str, running: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something until the process ends; what dies ends the process."""

    def guard(self) -> list[tuple[str, int]]:
        """Return where this process listens so far, and discovery servers do: no stream goes there."""

    def has(self, role: str) -> bool:
        """Tell whether the process runs a role."""


class Role:
    """One role of a process. What a role has nothing to do for, it leaves as it is here.

    In this order: `open`, `publish`, `predecessor_gone` after a handover; any number of `changes`; then `withdraw` or `hand_over`,
    `stop_accepting`, and when it is idle or has had its time, `give_back`.
    """

    name: ClassVar[str]
    """Its section in the file."""
    before_discovery: ClassVar[bool] = False
    """Opened before there is a client of discovery, which may ask it."""
    ledger: StreamLog | None = None
    """Its streams, where it carries some."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.addresses: list[tuple[str, int]] = []
        """Where it listens, with the ports that were chosen for 0."""

    async def begin(self, opening: Awaitable[T]) -> T:
        """Wait for a step of the start. Raises StartError for what an operator can mend."""
        return await beginning(self.name, opening)

    def listens(self, addresses: Iterable[tuple[str, int]]) -> None:
        """Note where it listens."""
        self.addresses = list(addresses)

    @property
    def active(self) -> bool:
        """Whether the process shows it as running."""
        return True

    async def open(self) -> None:
        """Bind and run. Raises StartError."""

    def publish(self) -> None:
        """Write its records, where that is not a task of its own."""

    def predecessor_gone(self) -> None:
        """The process that we come after accepts nothing any more."""

    @property
    def settled(self) -> bool:
        """Whether it has what a successor must have before its predecessor may go."""
        return True

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield what makes it go by `new`, which differs from `old` only in live settings.

        All are made before the first is called. One that fails raises and leaves its part as it was; Refused says why to people.
        """
        del old, new
        yield from ()

    def sockets(self) -> Iterator[tuple[Place, int]]:
        """Yield its listening sockets, for a process that comes after us."""
        yield from ()

    def stop_listening(self) -> None:
        """Let nobody come by the listening sockets, which a successor has as well."""

    def withdraw(self) -> None:
        """Take back its records: clients and other networks look elsewhere from now on."""

    def hand_over(self) -> None:
        """Leave its records to a successor, which has written the same ones by now."""

    def comes_until(self, now: float) -> float:
        """Return until when, in the loop's time, clients may still come by what they were told before `now`."""
        return now

    def stop_accepting(self) -> None:
        """Take nothing new in; streams go on."""

    @property
    def idle(self) -> bool:
        """Whether nothing is open that should be waited for."""
        return True

    @property
    def open_streams(self) -> int:
        """How many streams an end would cut now."""
        return 0 if self.ledger is None else len(self.ledger)

    async def give_back(self) -> None:
        """Return what others hold for us, so that nobody comes for what is no longer here."""

    def conditions(self) -> Iterator[Condition]:
        """Yield what must hold for the process to be ready."""
        yield from ()

    def status(self) -> dict[str, object]:
        """Return its part of the status, for people."""
        return {}


async def beginning(what: str, opening: Awaitable[T]) -> T:
    """Wait for a step of the start. Raises StartError, which names it, for what an operator can mend."""
    try:
        return await opening
    except (OSError, ValueError, StoreError, ServerRefused, BadFile) as error:
        raise StartError(f"{what}: {error}") from error
