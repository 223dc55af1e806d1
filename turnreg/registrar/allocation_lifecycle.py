"""One allocation of a registration, from its creation to its end.

Not here: when an allocation is made and which one is published (`turnreg.registrar.registration_state`).
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from enum import StrEnum

from turnreg.client.allocation import Allocation, TurnError, TurnReason
from turnreg.registrar.allocation_factory import AllocationFactory, Server, Shown, Wanted, dialler, parsed
from turnreg.registrar.config import TurnCredentials

log = logging.getLogger(__name__)

RENEW_AFTER = 2 / 3
"""Part of their lifetime after which credentials are replaced; the rest leaves time for retries."""


class Renewal(StrEnum):
    """Result of a renewal of credentials. Metric label."""

    IN_PLACE = "in_place"
    REPLACED = "replaced"
    """The server accepts no new credentials for an existing allocation: a new one is published, and the old one retired."""
    FAILED = "failed"
    """It failed and will be retried."""


class ManagedAllocation:
    """An allocation, with the server and credentials that it was made for."""

    def __init__(
        self,
        server: Server,
        credentials: TurnCredentials,
        ca: str | None,
        *,
        factory: AllocationFactory,
        attempt: int,
        on_change: Callable[[], None],
    ) -> None:
        """Start without an allocation; `begin()` makes it.

        Args:
            ca: authorities of a `turns:` server, as PEM; None: the system's.
            attempt: number of failed attempts before; selects among the addresses of the server's name.
            on_change: called when it is ready and when it has ended.
        """
        self.server, self.credentials, self.ca = server, credentials, ca
        self.allocation: Allocation | None = None
        self.error: TurnError | None = None
        self.over = False
        self.ready_at: float | None = None
        """Unix time, for display."""
        self.steady_from = 0.0
        """When it became ready, on the loop's clock."""
        self.retired_at = 0.0
        self.renew_at: float | None = None
        """When to replace its credentials, on the loop's clock."""
        self.outdated = False
        """The server accepts no new credentials for it, so another allocation must replace it before they expire."""
        self._loop = asyncio.get_running_loop()
        self._factory, self._attempt, self._on_change = factory, attempt, on_change
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether peers can connect to it."""
        return self.ready_at is not None and not self.over

    @property
    def streams(self) -> int:
        """Number of open streams."""
        return 0 if self.allocation is None else self.allocation.streams

    def is_for(self, wanted: Wanted) -> bool:
        """Tell whether it was made for this server, these credentials and this authority."""
        return (self.server, self.credentials, self.ca) == wanted

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Run the allocation in a new task until it is lost or closed. The error, if any, is stored in `error`."""
        self._task = group.create_task(self._run())

    async def close(self) -> None:
        """Delete the allocation, which ends its streams. Takes a bounded time."""
        if self.ready and self.allocation is not None:
            await self.allocation.close()
        elif self._task is not None:
            self._task.cancel()

    async def renew(self) -> None:
        """Replace the credentials of the allocation. Raises TurnError; sets `outdated` if the server does not support it."""
        assert self.allocation is not None
        given = await self._factory.show(self.credentials)
        try:
            await self.allocation.renew(given.credentials)
        except TurnError as exc:
            if exc.reason not in (TurnReason.TIMEOUT, TurnReason.CONNECTION_LOST):
                self.outdated = True
            raise
        self._note(given)

    def _note(self, given: Shown) -> None:
        self.renew_at = None
        if given.lifetime_s is not None:
            # Spread out: at our start, many allocations are made in the same second.
            self.renew_at = self._loop.time() + given.lifetime_s * RENEW_AFTER * random.uniform(0.85, 1)

    async def _run(self) -> None:
        try:
            try:
                await self._live(None)
            except TurnError as exc:
                if exc.alternate is None or self.ready_at is not None:
                    raise
                # A redirect is followed once, with the same credentials and the same name (RFC 8489, section 10).
                log.info("turn_redirected", extra={"event": {"url": self.server.url, "to": list(exc.alternate)}})
                await self._live(exc.alternate)
        except TurnError as exc:
            self.error = exc
        except Exception as exc:  # an error in one registration must not end the others
            log.exception("registration_error", extra={"event": {"url": self.server.url}})
            self.error = TurnError(TurnReason.INTERNAL, type(exc).__name__)
        finally:
            self.over = True
            self._on_change()

    async def _live(self, alternate: tuple[str, int] | None) -> None:
        url = parsed(self.server.url)
        dial = dialler(url, self.ca)
        given = await self._factory.show(self.credentials)
        address, port = alternate or await self._factory.find(url, self._attempt)
        await self._factory.admit(address, port)
        self._note(given)
        self.allocation = self._factory.make(self.server, address, port, given.credentials, dial)
        await self.allocation.run(self._ready)

    def _ready(self) -> None:
        self.ready_at, self.steady_from = time.time(), self._loop.time()
        self._on_change()
