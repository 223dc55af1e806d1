"""One registration: our allocation on one TURN server of another network, had again whenever it is lost.

Which TURN servers there are is `turnreg.registrar.registrar`; the life of one allocation is `.allocation_lifecycle`.

A registration has one allocation that is published, the current one. When its credentials run out, or others are to be
used, another one is made first; the record then names that one's port in place of the old, in one write, and the old one
is retired: it goes on until its streams have ended. Relays never see a moment without one.
"""

import asyncio
import hashlib
import logging
import math
from collections.abc import Callable
from typing import Any

from discovery.client.client import Discovery
from discovery.model.addresses import BadAddress, TurnUrl, parse_address, spellings
from discovery.model.mesh import AllocationSpec, Kind
from discovery.model.spec import MAX_ID
from turnreg.client.allocation import Allocation, BindResult, Bound, Credentials, Dial, TurnError, TurnReason
from turnreg.registrar import allocation_lifecycle
from turnreg.registrar.allocation_lifecycle import ManagedAllocation, Renewal, Server, Shown, Wanted
from turnreg.registrar.config import RegistrarConfig, TurnCredentials
from turnreg.registrar.destinations import Destinations

log = logging.getLogger(__name__)

STEADY_S = 10.0
"""An allocation lost sooner than that counts as one more failure in a row: a server may accept and drop us for ever."""

MAX_RETIRED = 8
"""Allocations that go on for the sake of their streams. One more, and the oldest of those with the fewest streams is closed: by
then it has seen at least that many renewals, hours for credentials of one hour."""

LOOK_AGAIN_S = 5.0
"""How often a retired allocation is looked at: streams end without telling."""

FORGET_MARGIN_S = 0.1
"""A timer may fire a little before its time."""

LOOK_AGAIN_S = 1.0
"""How often a registration that has to wait for its next try at an address looks whether it still has to."""

LOG_AGAIN_S = 60.0
"""The same failure over and over is logged that often, with how often it was."""


def record_id(gateway: str, via: str, turn: str, replica: int = 0) -> str:
    """Make the id of an allocation record: the same at every registration, another for every gateway and replica.

    Network ids have no dots. Where a gateway's or TURN server's id has some, or all is too long, a hash keeps ids apart.
    """
    suffix = f".{replica + 1}" if replica else ""
    text = f"{gateway}.{via}.{turn}{suffix}"
    if len(text) <= MAX_ID and text.count(".") == 2 + bool(suffix):
        return text
    digest = hashlib.sha256(f"{gateway}\0{via}\0{turn}{suffix}".encode()).hexdigest()[:16]
    return f"{text[: MAX_ID - 17].rstrip('.-_')}-{digest}"


class Registration:
    """The life of one registration. The registrar says what is wanted; `run()` makes it so until nothing is."""

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
    ) -> None:
        """Describe it; `want()` and `run()` begin it. `on_outcome` is told "ok" or the TurnReason of every attempt."""
        self.via, self.turn = via, turn
        self.record = record_id(config.gateway, via, turn, replica)
        self._config, self._discovery, self._destinations = config, discovery, destinations
        self._on_stream, self._on_bind = on_stream, on_bind
        self._on_outcome, self._on_renewal = on_outcome, on_renewal
        self._server: Server | None = None
        self._credentials: TurnCredentials | None = None
        self._peers: frozenset[str] = frozenset()
        self._leaving: dict[str, float] = {}  # addresses of relays that withdrew, until when on the loop's clock
        self._draining = self._ending = self._released = False
        self._changed = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._current: ManagedAllocation | None = None
        self._coming: ManagedAllocation | None = None
        self._retired: list[ManagedAllocation] = []
        self._renewing = False
        self._port: int | None = None  # what the record says
        self._gone_at: float | None = None
        self._retry_at = 0.0
        self._failures = 0
        self._binds = 0
        self._last: TurnError | None = None
        self._logged_at = -LOG_AGAIN_S
        self._unlogged = 0

    # What is wanted

    def want(self, server: Server | None, credentials: TurnCredentials | None, peers: frozenset[str]) -> None:
        """Say where, as whom and for which peers to register; without server or credentials, not at all."""
        if peers != self._peers:
            loop = asyncio.get_running_loop()
            for address in self._peers - peers:
                self._leaving[address] = loop.time() + self._config.linger_s
            if self._peers - peers:
                loop.call_later(self._config.linger_s + FORGET_MARGIN_S, self._admit)
            self._peers = peers
            self._admit()
        if (server, credentials) != (self._server, self._credentials):
            self._server, self._credentials = server, credentials
            self._retry_at = 0.0
            self._changed.set()
        self._released = False

    def reconfigure(self, config: RegistrarConfig) -> None:
        """Go by this from now on, and try at once what has failed so far. Where its allocation may not be any more, none stays."""
        self._config = config
        self._retry_at = 0.0
        current = self._current
        if current is not None and current.allocation is not None:
            where = current.allocation.address, current.allocation.port
            if (why := self._refusal(*where, known=True)) is not None:
                self._withdraw()
                self._retire(current, asyncio.get_running_loop().time())
                self._current = None
                self._failed(TurnError(TurnReason.REFUSED_ADDRESS, why), event="allocation_refused")
                self._retry_at = 0.0
        self._changed.set()

    def _refusal(self, address: str, port: int, *, known: bool = False) -> str | None:
        """Say why this gateway is not to connect there for this network; None: it may. `known`: we are connected there."""
        now = asyncio.get_running_loop().time()
        try:
            return self._destinations.refusal(self.via, address, port, self._discovery.mesh, now, known=known)
        except BadAddress as exc:
            return str(exc)

    def _admit(self) -> None:
        """Let connect whom we want now, and for a while whom we wanted: a relay that drains has withdrawn its record, and still
        has clients whose resolver has not heard of it."""
        now = asyncio.get_running_loop().time()
        self._leaving = {address: until for address, until in self._leaving.items() if until > now}
        for one in self._tenures():
            if one.allocation is not None:
                one.allocation.allow(self._admitted())

    def _admitted(self) -> frozenset[str]:
        return self._peers | self._leaving.keys()

    def release(self) -> None:
        """Want it no longer, though the server is there: others have taken our part. What streams there are go on."""
        if not self._released:
            self._server = self._credentials = None
            self._released = True
            self._changed.set()

    def drain(self) -> None:
        """Withdraw the record for good; what we hold stays, so that streams can end."""
        self._draining = True
        self._withdraw()
        self._changed.set()

    def hand_over(self) -> None:
        """Leave the record to a successor that has put its own in its place; what we hold stays, so that streams can end."""
        self._draining = True
        self._port = None
        self._changed.set()

    def end(self) -> None:
        """Give everything back and make `run()` return."""
        self.drain()
        self._ending = True

    @property
    def ready(self) -> bool:
        """There is an allocation, and peers can connect to it."""
        return self._current is not None and self._current.ready

    @property
    def published(self) -> bool:
        """Relays can know of it."""
        return self._port is not None

    @property
    def failing(self) -> bool:
        """It is without an allocation, and the last attempt was in vain."""
        return not self.ready and self._failures > 0

    @property
    def refused(self) -> bool:
        """It is without an allocation, since the record of the TURN server leads where we do not go."""
        return self.failing and self._last is not None and self._last.reason is TurnReason.REFUSED_ADDRESS

    @property
    def servers(self) -> frozenset[tuple[str, int]]:
        """Addresses and ports of the servers that we hold allocations on, or are about to."""
        held = (one.allocation for one in self._tenures())
        return frozenset((allocation.address, allocation.port) for allocation in held if allocation is not None)

    def status(self) -> dict[str, Any]:
        """Say how things are, for people; no secrets.

        `state` is waiting, registering, ready, lingering (no record of the server any more), draining, refused_address.
        """
        current, last = self._current, self._last
        lines: dict[str, Any] = {
            "via": self.via,
            "turn": self.turn,
            "record": self.record,
            "url": self._server.url if self._server else None,
            "state": self._state(),
            "published": self.published,
            "failures": 0 if self.ready else self._failures,
            "streams_bound": self._binds,
            "retired": len(self._retired),
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
            if self._draining or self._released:
                return "draining"
            return "ready" if self.published else "lingering"
        if self.refused:
            return "refused_address"
        return "waiting" if self._coming is None else "registering"

    def _tenures(self) -> list[ManagedAllocation]:
        return [one for one in (self._current, self._coming, *self._retired) if one is not None]

    # Life

    async def run(self) -> None:
        """Register, and again whenever that fails or is lost, until nothing is wanted any more."""
        async with asyncio.TaskGroup() as self._group:
            try:
                while True:
                    self._changed.clear()
                    try:
                        if self._step(asyncio.get_running_loop().time()):
                            break
                    except Exception as exc:  # one registration's fault must not end the others
                        log.exception("registration_error", extra={"event": {"via": self.via, "turn": self.turn}})
                        self._failed(TurnError(TurnReason.INTERNAL, type(exc).__name__))
                    await self._changes()
            finally:
                self._withdraw()
            for one in self._tenures():
                self._group.create_task(one.close())

    def _wanted(self) -> Wanted | None:
        if self._draining or self._server is None or self._credentials is None:
            return None
        return self._server, self._credentials, self._config.ca.get(self.via)

    async def _changes(self) -> None:
        """Wait until there may be something to do."""
        loop = asyncio.get_running_loop()
        due = self._due()
        try:
            async with asyncio.timeout_at(None if due is None else max(due, loop.time() + 0.001)):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _due(self) -> float | None:
        dues = []
        current, wanted = self._current, self._wanted()
        if wanted is not None and self._coming is None:
            if current is None or self._replaces(current, wanted) or not self.published:
                dues.append(self._retry_at)
            elif current.renew_at is not None and not self._renewing:
                dues.append(max(current.renew_at, self._retry_at))
        if self._gone_at is not None and not self._draining:
            dues.append(self._gone_at + self._config.linger_s)
        now = asyncio.get_running_loop().time()
        overlap_s = self._config.overlap_s
        dues.extend(
            max(one.retired_at + overlap_s, now + LOOK_AGAIN_S if one.streams else 0.0) for one in self._retired
        )
        return min(dues, default=None)

    def _step(self, now: float) -> bool:
        """Bring what there is in line with what is wanted, as far as that is done at once; True when all is over."""
        self._reap(now)
        wanted = self._wanted()
        if wanted is None:
            return self._wind_down(now)
        self._gone_at = None
        if self._coming is not None and not self._coming.is_for(wanted):
            self._close(self._coming)
            self._coming = None
        if self._coming is not None and self._coming.ready:
            if self._current is not None:
                self._retire(self._current, now)
            self._current, self._coming = self._coming, None
            self._prove(self._current)
            self._on_outcome("ok")
            self._logged_at = -LOG_AGAIN_S
        current = self._current
        if current is not None and current.server != wanted[0]:
            self._withdraw()  # relays take the address from the record of the server
        elif current is not None and now >= self._retry_at:
            self._publish(current)
        replaces = current is None or self._replaces(current, wanted)
        if replaces and self._restored(wanted, now):
            return self._step(now)
        if self._coming is None and now >= self._retry_at:
            if current is None or replaces:
                self._coming = self._begun(*wanted)
            elif current.renew_at is not None and now >= current.renew_at and not self._renewing:
                self._renewing = True
                self._spawn(self._renew(current))
        return False

    @staticmethod
    def _replaces(current: ManagedAllocation, wanted: Wanted) -> bool:
        return current.outdated or not current.is_for(wanted)

    def _restored(self, wanted: Wanted, now: float) -> bool:
        """Take back a retired allocation that is just what is wanted again: a change that was undone costs no new one."""
        for one in self._retired:
            if not one.ready or one.outdated or not one.is_for(wanted) or one.allocation is None:
                continue
            if self._refusal(one.allocation.address, one.allocation.port, known=True) is None:
                self._retired.remove(one)
                if self._current is not None:
                    self._retire(self._current, now)
                if self._coming is not None:
                    self._close(self._coming)
                self._current, self._coming = one, None
                return True
        return False

    def _prove(self, one: ManagedAllocation) -> None:
        """Note that there is a TURN server at this address."""
        if one.allocation is not None:
            now = asyncio.get_running_loop().time()
            self._destinations.succeeded(self.via, one.allocation.address, one.allocation.port, now)

    def _reap(self, now: float) -> None:
        """Note what has ended, and end what nobody uses."""
        for one in (self._coming, self._current):
            if one is None or not one.over:
                continue
            was_ready = one is self._current
            if was_ready:
                self._withdraw()
                self._prove(one)
                self._current = None
            else:
                self._coming = None
            if one.error is not None:
                if one.error.code is not None:
                    self._prove(one)  # a TURN server has answered, if only to say no
                steady = was_ready and now - one.steady_from >= STEADY_S
                self._failed(one.error, steady=steady, event="allocation_lost" if was_ready else "registration_failed")
        self._retired = [one for one in self._retired if not one.over]
        for one in list(self._retired):
            if now >= one.retired_at + self._config.overlap_s and not one.streams:
                self._retired.remove(one)
                self._close(one)

    def _wind_down(self, now: float) -> bool:
        """Nothing is wanted: withdraw, and see streams off. True when that is done."""
        self._withdraw()
        if self._coming is not None:
            self._close(self._coming)
            self._coming = None
        if self._current is not None and self._released:
            self._retire(self._current, now)
            self._current = None
        if self._current is not None and not self._draining:
            # The server's record is gone: discovery may be at fault, or its lease, and not the server.
            self._gone_at = now if self._gone_at is None else self._gone_at
            if now >= self._gone_at + self._config.linger_s:
                return True
        return self._ending or (self._current is None and not self._retired)

    def _retire(self, one: ManagedAllocation, now: float) -> None:
        one.retired_at = now
        self._retired.append(one)
        if len(self._retired) > MAX_RETIRED:
            least = min(self._retired[:-1], key=lambda retired: retired.streams)
            self._retired.remove(least)
            self._close(least)

    def _close(self, one: ManagedAllocation) -> None:
        self._spawn(one.close())

    def _spawn(self, work: Any) -> None:
        assert self._group is not None, "only while running"
        self._group.create_task(work)

    def _begun(self, server: Server, credentials: TurnCredentials, ca: str | None) -> ManagedAllocation:
        async def show(credentials: TurnCredentials) -> Shown:
            return await allocation_lifecycle.shown(self._config, self._discovery, self.via, credentials)

        async def find(url: TurnUrl) -> tuple[str, int]:
            return await allocation_lifecycle.endpoint(url, self._failures, await self._refusals())

        def make(address: str, port: int, credentials: Credentials, dial: Dial) -> Allocation:
            return Allocation(
                address=address,
                port=port,
                credentials=credentials,
                on_stream=self._on_stream,
                via=self.via,
                turn=self.turn,
                record=self.record,
                peers=self._admitted(),
                family=server.family,
                on_bind=self._bound,
                dial=dial,
                timing=self._config.timing,
            )

        one = ManagedAllocation(
            server,
            credentials,
            show=show,
            find=find,
            make=make,
            admit=self._may_dial,
            ca=ca,
            on_change=self._changed.set,
        )
        assert self._group is not None, "only while running"
        one.begin(self._group)
        return one

    async def _refusals(self) -> Callable[[str, int], str | None]:
        """Look up what discovery servers there are by name, and return what says why an address and port are not dialled."""
        named = await allocation_lifecycle.resolved(self._config.guard_names)

        def refusal(address: str, port: int) -> str | None:
            why = self._refusal(address, port)
            if why is None and any((str(one), port) in named for one in spellings(parse_address(address))):
                return f"{address} port {port} is a discovery server"
            return why

        return refusal

    async def _may_dial(self, address: str, port: int) -> None:
        """Wait until an address may be tried, and count that it is. Raises TurnError where it never may be."""
        loop = asyncio.get_running_loop()
        refusal = await self._refusals()
        while (why := refusal(address, port)) is None:
            wait_s = self._destinations.wait_s(self.via, address, port, loop.time())
            if not wait_s:
                self._destinations.began(self.via, address, port, loop.time())
                return
            # Another registration may find meanwhile that a TURN server is there.
            await asyncio.sleep(min(wait_s, LOOK_AGAIN_S))
        raise TurnError(TurnReason.REFUSED_ADDRESS, why)

    async def _renew(self, current: ManagedAllocation) -> None:
        """Give the current allocation new credentials before the old ones expire, or have it replaced."""
        try:
            await current.renew()
            self._on_renewal(Renewal.IN_PLACE)
        except TurnError as exc:
            if current.outdated:
                self._on_renewal(Renewal.REPLACED)
            else:
                self._on_renewal(Renewal.FAILED)
                if not current.over:  # else `_reap` has it
                    self._failed(exc, event="renewal_failed")
        finally:
            self._renewing = False
            self._changed.set()

    def _failed(self, error: TurnError, *, steady: bool = False, event: str = "registration_failed") -> None:
        """Take a failure down, and decide when to try again."""
        self._failures = 1 if steady else self._failures + 1
        delay_s = self._config.retry.pause_s(self._failures, error.reason)
        now = asyncio.get_running_loop().time()
        self._retry_at = now + delay_s
        known = self._last is not None and self._last.reason is error.reason
        if (
            error.reason is TurnReason.REFUSED_ADDRESS
        ):  # a decision of ours, which stands until something changes: said once
            again_s = (
                math.inf if known and self._last is not None and self._last.detail == error.detail else LOG_AGAIN_S
            )
        else:
            again_s = LOG_AGAIN_S
        self._last = error
        self._on_outcome(error.reason)
        if known and now - self._logged_at < again_s:
            self._unlogged += 1
            return
        self._log(event, error, delay_s)
        self._logged_at, self._unlogged = now, 0

    def _bound(self, result: BindResult) -> None:
        self._binds += result is BindResult.OK
        self._on_bind(result)

    # The record

    def _publish(self, current: ManagedAllocation) -> None:
        allocation, server = current.allocation, current.server
        if self._draining or allocation is None or allocation.relayed is None or allocation.relayed[1] == self._port:
            return
        port = allocation.relayed[1]
        if not server.port_min <= port <= server.port_max:
            ports = f"{server.port_min}-{server.port_max}"
            fields = {"allocation": self.record, "port": port, "ports": ports, "detail": "relays will refuse it"}
            log.warning("relayed_port_outside", extra={"event": fields})
        spec = AllocationSpec(
            via=self.via,
            turn=self.turn,
            port=port,
            gateway=self._config.gateway,
            proto=list(self._config.proto),
            weight=self._config.weight,
        )
        self._discovery.publish(Kind.ALLOCATION, self.record, spec)
        self._port = port
        self._log("allocation")

    def _withdraw(self) -> None:
        if self.published:
            self._port = None
            self._discovery.withdraw(Kind.ALLOCATION, self.record)

    def _log(self, event: str, error: TurnError | None = None, retry_s: float | None = None) -> None:
        fields: dict[str, Any] = {"via": self.via, "turn": self.turn, "allocation": self.record}
        allocation = self._current.allocation if self._current is not None else None
        if allocation is not None and allocation.relayed is not None:
            fields |= {"relayed": list(allocation.relayed), "lifetime_s": allocation.lifetime_s}
        if error is not None:
            fields |= {"reason": str(error.reason), "detail": error.detail, "failures": self._failures}
            if self._unlogged:
                fields["not_logged"] = self._unlogged
        if retry_s is not None:
            fields["retry_s"] = round(retry_s, 3)
        log.log(logging.INFO if error is None else logging.WARNING, event, extra={"event": fields})
