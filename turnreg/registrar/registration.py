"""One registration: keeps our allocation on one TURN server of another network, and makes a new one whenever it is lost.

`turnreg.registrar.registrar` knows which TURN servers there are; `.registration_state` decides what to do and when, and this module
does it; `.allocation_lifecycle` handles one allocation.

A registration has one published allocation, the current one. When its credentials expire, or others are to be used, a new
allocation is made first. The record is then changed to its port in one write, and the old allocation is retired: it stays until its
streams have ended. Relays always see one allocation.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, assert_never

from discovery.client.contract import Discovery
from turnreg.client.allocation import BindResult, Bound, TurnError, TurnReason
from turnreg.registrar.admitted_peers import AdmittedPeers
from turnreg.registrar.allocation_factory import AllocationFactory, LookUp, Server, Wanted
from turnreg.registrar.allocation_lifecycle import ManagedAllocation, Renewal
from turnreg.registrar.allocation_record import AllocationRecord
from turnreg.registrar.config import RegistrarConfig, TurnCredentials
from turnreg.registrar.destinations import Destinations
from turnreg.registrar.failure_log import FailureLog
from turnreg.registrar.registration_state import (
    Acquired,
    Action,
    Answered,
    Begin,
    Close,
    Failed,
    Publish,
    RegistrationState,
    Renew,
    State,
    Withdraw,
)

log = logging.getLogger(__name__)

FORGET_MARGIN_S = 0.1
"""A timer may fire slightly early."""


class Registration:
    """One registration. The registrar says what is wanted by `want()`; `run()` carries it out until nothing is wanted any more."""

    def __init__(
        self,
        config: RegistrarConfig,
        discovery: Discovery,
        via: str,
        turn: str,
        replica: int = 0,
        *,
        destinations: Destinations,
        on_stream: Callable[[Bound], None],
        on_bind: Callable[[BindResult], None],
        on_outcome: Callable[[str], None],
        on_renewal: Callable[[Renewal], None],
        look_up: LookUp,
    ) -> None:
        """Make a registration, which does nothing before `want()` and `run()`.

        Args:
            on_stream: called with each stream of a peer.
            on_bind: called with the result of each peer's bind.
            on_outcome: called with "ok" or the TurnReason for every attempt.
            on_renewal: called with the result of each renewal of credentials.
            look_up: resolves the names of TURN servers.
        """
        self.via, self.turn = via, turn
        self.record = AllocationRecord(discovery, config.gateway, via, turn, replica)
        self._config = config
        self._on_bind, self._on_outcome, self._on_renewal = on_bind, on_outcome, on_renewal
        self._peers = AdmittedPeers()
        self._factory = AllocationFactory(
            config,
            discovery,
            destinations,
            self._peers,
            via=via,
            turn=turn,
            record=self.record.id,
            on_stream=on_stream,
            on_bind=self._bound,
            look_up=look_up,
        )
        self.allocations: RegistrationState[ManagedAllocation] = RegistrationState(config, may_keep=self._may_keep)
        self._server: Server | None = None
        self._credentials: TurnCredentials | None = None
        self._changed = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._loop = asyncio.get_running_loop()
        self._failure_log = FailureLog()
        self._binds = 0

    # What is wanted

    def want(self, server: Server | None, credentials: TurnCredentials | None, peers: frozenset[str]) -> None:
        """Set the server, credentials and peers to register for. If server or credentials are None, nothing is wanted."""
        linger_s = self._config.linger_s
        if self._peers.want(peers, self._loop.time(), linger_s):
            self._loop.call_later(linger_s + FORGET_MARGIN_S, self._admit)
            self._admit()
        if (server, credentials) != (self._server, self._credentials):
            self._server, self._credentials = server, credentials
            self.allocations.retry_at = 0.0
            self._changed.set()
        self.allocations.released = False

    def reconfigure(self, config: RegistrarConfig) -> None:
        """Use these settings from now on, and retry at once if attempts have failed.

        The current allocation is retired if we may no longer connect to its server.
        """
        self._config = self._factory.config = self.allocations.config = config
        current = self.allocations.current
        if current is not None and (why := self._forbidden(current)) is not None:
            now = self._loop.time()
            error = TurnError(TurnReason.REFUSED_ADDRESS, why)
            self._perform(
                [*self.allocations.expel(now), self.allocations.failed(error, now, event="allocation_refused")]
            )
        self.allocations.retry_at = 0.0
        self._changed.set()

    def _forbidden(self, held: ManagedAllocation) -> str | None:
        """Return why we must not be connected to the server of this allocation, None if we may."""
        if held.allocation is None:
            return None
        return self._factory.refusal(held.allocation.address, held.allocation.port, known=True)

    def _may_keep(self, held: ManagedAllocation) -> bool:
        return held.allocation is not None and self._forbidden(held) is None

    def _admit(self) -> None:
        """Set the permissions of all allocations to the peers that are wanted."""
        self._peers.forget(self._loop.time())
        for one in self.allocations.held:
            if one.allocation is not None:
                one.allocation.allow(self._peers.addresses)

    def release(self) -> None:
        """Want nothing although the server exists, because other gateways have taken over. Open streams continue."""
        if not self.allocations.released:
            self._server = self._credentials = None
            self.allocations.released = True
            self._changed.set()

    def drain(self) -> None:
        """Withdraw the record for good. Allocations stay, so that streams can end."""
        self.allocations.draining = True
        self.record.withdraw()
        self._changed.set()

    def hand_over(self) -> None:
        """Leave the record to a successor that has replaced it with its own. Allocations stay, so that streams can end."""
        self.allocations.draining = True
        self.record.leave()
        self._changed.set()

    def end(self) -> None:
        """Delete all allocations and make `run()` return."""
        self.drain()
        self.allocations.ended = True

    @property
    def ready(self) -> bool:
        """Whether there is an allocation that peers can connect to."""
        return self.allocations.current is not None and self.allocations.current.ready

    @property
    def published(self) -> bool:
        """Whether the record is published, so that relays can see it."""
        return self.record.published

    @property
    def failing(self) -> bool:
        """Whether there is no allocation and the last attempt failed."""
        return not self.ready and self.allocations.failures > 0

    @property
    def refused(self) -> bool:
        """Whether there is no allocation because this gateway refuses the address in the TURN server's record."""
        last = self._failure_log.last
        return self.failing and last is not None and last.reason is TurnReason.REFUSED_ADDRESS

    @property
    def servers(self) -> frozenset[tuple[str, int]]:
        """Addresses and ports of the servers that we hold allocations on or are making them on."""
        held = (one.allocation for one in self.allocations.held)
        return frozenset((allocation.address, allocation.port) for allocation in held if allocation is not None)

    def status(self) -> dict[str, Any]:
        """Describe the registration, for people. Contains no secrets.

        `state` is waiting, registering, ready, lingering (the server's record is gone), draining or refused_address.
        """
        current, last = self.allocations.current, self._failure_log.last
        lines: dict[str, Any] = {
            "via": self.via,
            "turn": self.turn,
            "record": self.record.id,
            "url": self._server.url if self._server else None,
            "state": self._state(),
            "published": self.published,
            "failures": 0 if self.ready else self.allocations.failures,
            "streams_bound": self._binds,
            "retired": len(self.allocations.retired),
            "last_error": None if last is None else {"reason": str(last.reason), "detail": last.detail},
        }
        if current is not None and current.ready and current.allocation is not None:
            allocation = current.allocation
            lines |= {
                "since": current.ready_at,
                "server": [allocation.address, allocation.port],
                "relayed": list(allocation.relayed or ()),
                "mapped": list(allocation.mapped or ()),
                "lifetime_s": allocation.lifetime_s,
                "permissions": sorted(allocation.permissions.granted),
                "refused": dict(sorted(allocation.permissions.refused.items())),
            }
        return lines

    def _state(self) -> str:
        if self.ready:
            if self.allocations.draining or self.allocations.released:
                return "draining"
            return "ready" if self.published else "lingering"
        if self.refused:
            return "refused_address"
        return "waiting" if self.allocations.coming is None else "registering"

    # Running

    async def run(self) -> None:
        """Register, and again after each failure or loss, until nothing is wanted any more."""
        async with asyncio.TaskGroup() as self._group:
            try:
                while True:
                    self._changed.clear()
                    with self._failures_counted():
                        self._perform(self.allocations.step(self._wanted(), self._loop.time()))
                        if self.allocations.state is State.OVER:
                            break
                    await self._changes()
            finally:
                self.record.withdraw()
            for one in self.allocations.held:
                self._group.create_task(one.close())

    def _wanted(self) -> Wanted | None:
        if self._server is None or self._credentials is None:
            return None
        return self._server, self._credentials, self._config.ca.get(self.via)

    async def _changes(self) -> None:
        """Wait until something has changed or the next step is due."""
        now = self._loop.time()
        due = self.allocations.due(now, published=self.published)
        try:
            async with asyncio.timeout_at(None if due is None else max(due, now + 0.001)):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _perform(self, actions: "list[Action[ManagedAllocation]]") -> None:
        for action in actions:
            with self._failures_counted():
                self._do(action)

    @contextlib.contextmanager
    def _failures_counted(self) -> Iterator[None]:
        """Count an unexpected exception as a failure, so that a bug in one registration does not end the others."""
        try:
            yield
        except Exception as exc:
            log.exception("registration_error", extra={"event": {"via": self.via, "turn": self.turn}})
            error = TurnError(TurnReason.INTERNAL, type(exc).__name__)
            self._tell(self.allocations.failed(error, self._loop.time(), event="registration_failed"))

    def _do(self, action: "Action[ManagedAllocation]") -> None:
        match action:
            case Begin(wanted=wanted):
                self.allocations.coming = self._begun(*wanted)
            case Publish(held=held):
                self._publish(held)
            case Withdraw():
                self.record.withdraw()
            case Renew(held=held):
                self._spawn(self._renew(held))
            case Close(held=held):
                self._spawn(held.close())
            case Acquired(held=held):
                self._prove(held)
                self._on_outcome("ok")
                self._failure_log.succeeded()
            case Answered(held=held):
                self._prove(held)
            case Failed():
                self._tell(action)
            case _:
                assert_never(action)

    def _begun(self, server: Server, credentials: TurnCredentials, ca: str | None) -> ManagedAllocation:
        one = ManagedAllocation(
            server,
            credentials,
            ca,
            factory=self._factory,
            attempt=self.allocations.failures,
            on_change=self._changed.set,
        )
        assert self._group is not None, "only while running"
        one.begin(self._group)
        return one

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None, "only while running"
        self._group.create_task(work)

    async def _renew(self, current: ManagedAllocation) -> None:
        """Give the current allocation new credentials before the old ones expire, or mark it to be replaced."""
        try:
            await current.renew()
            self._on_renewal(Renewal.IN_PLACE)
        except TurnError as exc:
            if current.outdated:
                self._on_renewal(Renewal.REPLACED)
            else:
                self._on_renewal(Renewal.FAILED)
                if not current.over:  # otherwise the next step handles it
                    self._tell(self.allocations.failed(exc, self._loop.time(), event="renewal_failed"))
        finally:
            self.allocations.renewed()
            self._changed.set()

    def _bound(self, result: BindResult) -> None:
        self._binds += result is BindResult.OK
        self._on_bind(result)

    def _prove(self, held: ManagedAllocation) -> None:
        """Record that there is a TURN server at this address."""
        if held.allocation is not None:
            self._factory.prove(held.allocation)

    def _publish(self, held: ManagedAllocation) -> None:
        allocation = held.allocation
        if allocation is None or allocation.relayed is None:
            return
        if self.record.publish(allocation.relayed[1], held.server, self._config):
            log.info("allocation", extra={"event": self._fields()})

    def _tell(self, failed: Failed) -> None:
        """Count a failure, and log it unless it repeats the last one."""
        error, now = failed.error, self._loop.time()
        self._on_outcome(error.reason)
        if not self._failure_log.admits(error, now):
            return
        fields = self._fields() | {
            "reason": str(error.reason),
            "detail": error.detail,
            "failures": self.allocations.failures,
        }
        if self._failure_log.suppressed:
            fields["not_logged"] = self._failure_log.suppressed
        log.warning(failed.event, extra={"event": fields | {"retry_s": round(failed.retry_s, 3)}})
        self._failure_log.logged(now)

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"via": self.via, "turn": self.turn, "allocation": self.record.id}
        current = self.allocations.current
        allocation = current.allocation if current is not None else None
        if allocation is not None and allocation.relayed is not None:
            fields |= {"relayed": list(allocation.relayed), "lifetime_s": allocation.lifetime_s}
        return fields
