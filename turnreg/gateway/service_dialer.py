"""Connecting to the target of a preamble: which address, whether it may be dialled, and the next one after a failure."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from discovery.client.contract import Discovery
from discovery.model.addresses import Address, TargetList, format_endpoint, parse_address, refusal
from discovery.model.imports import BadImport, ImportRule, Imports
from discovery.model.lookup import Unresolved, reached
from discovery.model.mesh import Mesh
from discovery.model.names import AddressTarget, ServiceTarget
from sniproxy.access.loop_guard import STOPPED, LoopGuard
from sniproxy.access.reach import Endpoint, Reach
from sniproxy.access.rules import Flow, Policy
from sniproxy.endpoints.dialer import EndpointDialer, NoAnswer
from sniproxy.engine import ByteStream
from sniproxy.engine.host_addresses import is_own_address
from sniproxy.formats.proxy_protocol import ProxyHeader
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.preamble import Preamble, decode_target


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

    stream: ByteStream
    address: Address
    port: int
    ms: int
    """How long connecting took, in milliseconds."""

    @property
    def endpoint(self) -> str:
        """Address and port as text."""
        return format_endpoint(self.address, self.port)


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
        endpoints: EndpointDialer,
    ) -> None:
        self._network = network
        self._domain = domain
        self._discovery = discovery
        self._reach = Reach(network, domain)
        self._guard = LoopGuard(network, guard, is_own=is_own_address)
        self.reconfigure(allow, policy, dial_timeout_s=dial_timeout_s)
        self._endpoints = endpoints

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
        endpoints = self._reach.endpoints(name, port)
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

    async def _dial(
        self, preamble: Preamble, target: AddressTarget | ServiceTarget, endpoints: Iterable[Endpoint], header: bytes
    ) -> ServiceConnection:
        """Connect to one of these endpoints. Raises Undeliverable."""
        addresses = {(str(address), port): address for address, port in endpoints}
        refused = Reason.NO_ENDPOINT, "no endpoint"  # no exception: its traceback would hold this frame

        def may_be_dialled(endpoint: tuple[str, int]) -> bool:
            nonlocal refused
            address, port = addresses[endpoint], endpoint[1]
            refusal = self._refusal(preamble, target, address, port)
            if refusal is not None and refusal[0] is Reason.DENIED:
                refused = refusal
            return refusal is None

        service = f"{target.service}:{target.port}" if isinstance(target, ServiceTarget) else ""
        attempts = self._endpoints.attempts(service, list(addresses), may_be_dialled)
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            try:
                connected = await attempts.connect(timeout_s=self._dial_timeout_s)
            except NoAnswer as error:
                # A failed dial says more about the service than an endpoint that may not be dialled.
                reason, detail = (Reason.DIAL_FAILED, error.detail) if error.detail else refused
                raise Undeliverable(reason, detail) from None
            stream, endpoint = connected.stream, connected.endpoint
            address, port = addresses[endpoint], endpoint[1]
            # Records and rules may have changed while we dialled. Nothing has been sent to the service yet.
            refusal = self._refusal(preamble, target, address, port)
            if refusal is not None:
                stream.reset()
                refused = refusal
                continue
            try:
                if header:
                    await stream.send(header)
            except OSError as error:
                stream.close()
                attempts.reject(endpoint, error.strerror or str(error))
                continue
            except BaseException:
                stream.reset()
                raise
            return ServiceConnection(
                stream=stream, address=address, port=port, ms=round((loop.time() - started) * 1000)
            )

    def _refusal(
        self, preamble: Preamble, target: AddressTarget | ServiceTarget, address: Address, port: int
    ) -> tuple[Reason, str] | None:
        """Return why an endpoint may not be dialled now, None if it may."""
        if not self._is_current(target, address, port):
            return Reason.NO_ENDPOINT, f"{format_endpoint(address, port)} is no longer an endpoint"
        why = self._why_not(preamble, target, address, port)
        return None if why is None else (Reason.DENIED, f"{format_endpoint(address, port)} {why}")

    def _is_current(self, target: AddressTarget | ServiceTarget, address: Address, port: int) -> bool:
        """Tell whether a service still has this endpoint in the current view: time passes between two dials."""
        self._follow(self._discovery.mesh)
        return isinstance(target, AddressTarget) or (address, port) in self._reach.endpoints(
            target.service, target.port
        )

    def undeliverable(self, address: Address, port: int, mesh: Mesh) -> str | None:
        """Return why this address and port may be dialled for no stream at all, None if it may for some."""
        if not self._allow.allows(address, port):
            return "is not in gateway.allow"
        why = refusal(address, self._allow)
        if why is not None:
            return f"is {why}"
        return STOPPED if self._guard.stops(address, port, mesh) else None

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
