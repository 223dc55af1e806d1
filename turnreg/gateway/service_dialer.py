"""Connecting to the target of a preamble: which address, whether it may be dialled, and the next one after a failure."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from discovery.client.contract import Discovery
from discovery.model.addresses import Address, TargetList, format_endpoint, parse_address, refusal
from discovery.model.imports import BadImport, ImportRule, Imports
from discovery.model.lookup import Unresolved, reached
from discovery.model.mesh import Mesh
from discovery.model.names import AddressTarget, ServiceTarget
from sniproxy.access.loop_guard import STOPPED, LoopGuard
from sniproxy.access.reach import Endpoint, Reach
from sniproxy.access.rules import Flow, Policy
from sniproxy.engine import ByteStream, connect
from sniproxy.engine.host_addresses import is_own_address
from sniproxy.formats.proxy_protocol import ProxyHeader
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.preamble import Preamble, decode_target

MAX_ENDPOINT_TRIES = 3
"""Most endpoints of a service that are tried for one stream: three timeouts of 3 s still fit into the relay's 10 s for OPENED."""


class Undeliverable(Exception):
    """No service was reached. `reason` decides whether the relay may try another gateway.

    `asleep` is the name of the service if waking it may help: it has this port, no endpoint answers, and the rules may admit the
    stream.
    """

    def __init__(self, reason: Reason, detail: str, *, asleep: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.asleep = asleep


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConnection:
    """A connection to a service; the PROXY header has been sent if the service wants one."""

    wire: ByteStream
    address: Address
    port: int
    ms: int
    """How long connecting took, in milliseconds."""

    @property
    def endpoint(self) -> str:
        """Address and port as text."""
        return format_endpoint(self.address, self.port)


class Dial(Protocol):
    """Connect to an IP address and port. Raises OSError, TimeoutError."""

    async def __call__(self, address: str, port: int, *, timeout_s: float) -> ByteStream: ...


class ServiceDialer:
    """Connects to services of one network for its gateway."""

    def __init__(
        self,
        network: str,
        domain: str,
        discovery: Discovery,
        allow: TargetList,
        policy: Policy,
        *,
        guard: Iterable[tuple[str, int]],
        dial_timeout_s: float,
        dial: Dial = connect,
    ) -> None:
        self._network = network
        self._domain = domain
        self._discovery = discovery
        self._reach = Reach(network, domain)
        self._guard = LoopGuard(network, guard, is_own=is_own_address)
        self.reconfigure(allow, policy, dial_timeout_s=dial_timeout_s)
        self._connect = dial
        self._turn: dict[str, int] = {}

    def reconfigure(self, allow: TargetList, policy: Policy, *, dial_timeout_s: float) -> None:
        """Use these from the next dial on."""
        self._allow = allow
        self._policy = policy
        self._dial_timeout_s = dial_timeout_s

    def watch(self) -> Callable[[], None]:
        """Follow discovery, so that endpoints that exist only between two streams are seen too. Call the result to stop."""
        self._follow(self._discovery.mesh)
        return self._discovery.subscribe(self._follow)

    async def connect(self, preamble: Preamble) -> ServiceConnection:
        """Connect to the target of a verified preamble. Its server name must lead to that target.

        Raises:
            Undeliverable: denied, no_endpoint, dial_failed or no_view; wrong_target, unknown_name, ambiguous_name or bad_name
                if the name does not lead to the target.
        """
        where, port = decode_target(preamble.target)
        mesh = self._discovery.mesh
        self._follow(mesh)
        if not self._discovery.synced and (self._policy.rules or not len(mesh)):
            raise Undeliverable(Reason.NO_VIEW, "this gateway has no view of discovery yet and no snapshot")
        try:
            place = reached(preamble.authority, where, port, mesh, self._network, self._domain)
        except Unresolved as error:
            raise Undeliverable(Reason(error.reason.value), error.detail) from None
        target = place.target
        if isinstance(target, AddressTarget):
            return await self._dial(preamble, target, [(target.address, port)], b"")
        assert place.service is not None
        spec, name = place.service.spec, target.service
        endpoints = self._rotated(name, port)
        if not endpoints:
            detail = f"service {name!r} has no endpoint for port {port}"
            may_be_woken = str(port) in spec.ports and not self._policy.is_hopeless(
                self._flow(preamble, target, None, port)
            )
            raise Undeliverable(Reason.NO_ENDPOINT, detail, asleep=name if may_be_woken else "")
        header = ProxyHeader(source=preamble.client, destination=preamble.local).packed(spec.proxy_version)
        try:
            return await self._dial(preamble, target, endpoints, header)
        except Undeliverable as error:
            if error.reason is Reason.DIAL_FAILED:
                error.asleep = name
            raise

    def _follow(self, mesh: Mesh) -> None:
        self._reach.follow(mesh, time.monotonic())

    def _rotated(self, name: str, port: int) -> tuple[Endpoint, ...]:
        """Return the endpoints in rotation: each call starts with the next one."""
        endpoints = self._reach.endpoints(name, port)
        if not endpoints:
            return ()
        key = f"{name}:{port}"
        if len(self._turn) > 2 * len(self._discovery.mesh) + 1024:
            self._turn.clear()  # names of services that no longer exist
        turn = self._turn[key] = (self._turn.get(key, -1) + 1) % len(endpoints)
        return endpoints[turn:] + endpoints[:turn]

    async def _dial(
        self, preamble: Preamble, target: AddressTarget | ServiceTarget, endpoints: Iterable[Endpoint], header: bytes
    ) -> ServiceConnection:
        failure = Undeliverable(Reason.NO_ENDPOINT, "no endpoint")
        tries = 0
        for address, port in endpoints:
            if tries == MAX_ENDPOINT_TRIES:
                break
            shown = format_endpoint(address, port)
            if not self._is_current(target, address, port):
                continue
            why = self._why_not(preamble, target, address, port)
            if why is not None:
                # A failed dial says more about the service than an endpoint that may not be dialled.
                if failure.reason is not Reason.DIAL_FAILED:
                    failure = Undeliverable(Reason.DENIED, f"{shown} {why}")
                continue
            tries += 1
            loop = asyncio.get_running_loop()
            started = loop.time()
            try:
                wire = await self._connect(str(address), port, timeout_s=self._dial_timeout_s)
            except TimeoutError:
                failure = Undeliverable(Reason.DIAL_FAILED, f"{shown}: no answer in {self._dial_timeout_s} s")
                continue
            except OSError as error:
                failure = Undeliverable(Reason.DIAL_FAILED, f"{shown}: {error.strerror}")
                continue
            # Records and rules may have changed while we dialled. Nothing has been sent to the service yet.
            is_current = self._is_current(target, address, port)
            why = self._why_not(preamble, target, address, port)
            if why is not None or not is_current:
                wire.reset()
                reason = Reason.NO_ENDPOINT if why is None else Reason.DENIED
                failure = Undeliverable(reason, f"{shown} {why or 'is no longer an endpoint'}")
                continue
            if header:
                try:
                    await wire.send(header)
                except OSError as error:
                    failure = Undeliverable(Reason.DIAL_FAILED, f"{shown}: {error.strerror}")
                    wire.close()
                    continue
                except BaseException:
                    wire.reset()
                    raise
            return ServiceConnection(wire=wire, address=address, port=port, ms=round((loop.time() - started) * 1000))
        try:
            raise failure
        finally:
            del failure  # its traceback keeps this frame alive

    def _is_current(self, target: AddressTarget | ServiceTarget, address: Address, port: int) -> bool:
        """Tell whether a service still has this endpoint in the current view: time passes between two dials."""
        self._follow(self._discovery.mesh)
        return isinstance(target, AddressTarget) or (address, port) in self._reach.endpoints(
            target.service, target.port
        )

    def _why_not(
        self, preamble: Preamble, target: AddressTarget | ServiceTarget, address: Address, port: int
    ) -> str | None:
        """Return why this address and port must not be dialled, None if it may be."""
        if not self._allow.allows(address, port):
            return "is not in gateway.allow"
        why = refusal(address, self._allow)
        if why is not None:
            return f"is {why}"
        if self._guard.stops(address, port, self._discovery.mesh):
            return STOPPED
        if preamble.imports is not None and isinstance(target, AddressTarget):
            service = self._not_imported(preamble.imports, address, port)
            if service is not None:
                return f"belongs to service {service!r}, which network {preamble.from_network!r} does not import"
        if not self._policy.rules:
            return None
        refused = self._policy.refusal(self._flow(preamble, target, address, port))
        return None if refused is None else f"may not be reached: gateway.rules: {refused}"

    def _not_imported(self, imports: str, address: Address, port: int) -> str | None:
        """Return the service that an address belongs to, None if it belongs to none or to one that the relay's network imports."""
        services = {owner.service for owner in self._reach.owners(address, port)}
        if not services:
            return None
        known = _read_imports(imports, self._network)
        return None if any(known.rule_for(service) for service in services) else min(services)

    def _flow(
        self, preamble: Preamble, target: AddressTarget | ServiceTarget, address: Address | None, port: int
    ) -> Flow:
        return self._reach.flow(
            target,
            name=preamble.authority,
            client=parse_address(preamble.client[0]),
            from_network=preamble.from_network,
            address=address,
            port=port,
        )


@lru_cache(64)
def _read_imports(text: str, network: str) -> Imports:
    """Parse the imports that a relay sent for its network. An invalid text imports nothing."""
    try:
        return Imports([ImportRule(names=tuple(text.split()), sources=(network,))])
    except BadImport:
        return Imports()
