"""From the target in a preamble to a connected service: which address, whether it may be dialled, and the next one on failure."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from discovery.addresses import Address, BadAddress, TargetList, format_endpoint, parse_address, parse_endpoint, refusal
from discovery.contract import Discovery
from sniproxy.engine import Wire, connect
from sniproxy.engine.host import is_own_address
from sniproxy.stream.loopguard import STOPPED, LoopGuard
from sniproxy.stream.policy import Flow, Policy
from sniproxy.stream.preamble import Preamble, decode_target
from sniproxy.stream.proxyproto import ProxyHeader
from sniproxy.stream.reason import Reason

MAX_ENDPOINT_TRIES = 3
"""Endpoints of a service tried for one stream: with the dial time-out of 3 s still inside the relay's 10 s for OPENED."""


class Undeliverable(Exception):
    """No service was reached. `reason` says whether another gateway may be asked.

    `asleep` is the name of a service that has this port but nothing that answers there, and that this stream may go to.
    """

    def __init__(self, reason: Reason, detail: str, *, asleep: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.asleep = asleep


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A connected service; a PROXY header that it asked for has been sent."""

    wire: Wire
    address: Address
    port: int
    ms: int
    """How long the dial took."""

    @property
    def endpoint(self) -> str:
        """The address and port as text."""
        return format_endpoint(self.address, self.port)


class Delivery:
    """Dials services of one network for its gateway."""

    def __init__(
        self,
        network: str,
        discovery: Discovery,
        allow: TargetList,
        policy: Policy,
        *,
        guard: Iterable[tuple[str, int]],
        dial_timeout_s: float,
    ) -> None:
        self._network = network
        self._discovery = discovery
        self._guard = LoopGuard(network, guard, is_own=is_own_address)
        self.reconfigure(allow, policy, dial_timeout_s=dial_timeout_s)
        self._turn: dict[str, int] = {}

    def reconfigure(self, allow: TargetList, policy: Policy, *, dial_timeout_s: float) -> None:
        """Go by these from the next dial on."""
        self._allow = allow
        self._policy = policy
        self._dial_timeout_s = dial_timeout_s

    async def connect(self, preamble: Preamble) -> Delivered:
        """Connect to what a proven preamble asks for.

        Raises:
            Undeliverable: denied, no_endpoint, unknown_name or dial_failed.
        """
        where, port = decode_target(preamble.target)
        if not isinstance(where, str):
            return await self._dial(preamble, [(where, port)], b"")
        service = self._discovery.mesh.service(self._network, where)
        if service is None:
            raise Undeliverable(Reason.UNKNOWN_NAME, f"this network has no service {where!r}")
        endpoints = self._rotated(where, port, service.spec.ports.get(str(port), []))
        if not endpoints:
            detail = f"service {where!r} has no endpoint for port {port}"
            may_be_woken = str(port) in service.spec.ports and not self._policy.is_hopeless(
                self._flow(preamble, None, port)
            )
            raise Undeliverable(Reason.NO_ENDPOINT, detail, asleep=where if may_be_woken else "")
        header = ProxyHeader(source=preamble.client, destination=preamble.local).packed(service.spec.proxy_version)
        try:
            return await self._dial(preamble, endpoints, header)
        except Undeliverable as error:
            if error.reason is Reason.DIAL_FAILED:
                error.asleep = where
            raise

    def _rotated(self, name: str, port: int, texts: list[str]) -> list[tuple[Address, int]]:
        """The endpoints, beginning with the one whose turn it is."""
        if not texts:
            return []
        key = f"{name}:{port}"
        if len(self._turn) > 2 * len(self._discovery.mesh) + 1024:
            self._turn.clear()  # names of services that came and went
        turn = self._turn[key] = (self._turn.get(key, -1) + 1) % len(texts)
        endpoints = []
        for text in texts[turn:] + texts[:turn]:
            with suppress(BadAddress):  # records are checked when written; one that slipped through is no endpoint
                endpoints.append(parse_endpoint(text))
        return endpoints

    async def _dial(self, preamble: Preamble, endpoints: list[tuple[Address, int]], header: bytes) -> Delivered:
        failure = Undeliverable(Reason.NO_ENDPOINT, "no endpoint")
        tries = 0
        for address, port in endpoints:
            if tries == MAX_ENDPOINT_TRIES:
                break
            shown = format_endpoint(address, port)
            why = self._why_not(preamble, address, port)
            if why is not None:
                # An endpoint that was tried in vain says more about the service than one that never may be.
                if failure.reason is not Reason.DIAL_FAILED:
                    failure = Undeliverable(Reason.DENIED, f"{shown} {why}")
                continue
            tries += 1
            loop = asyncio.get_running_loop()
            started = loop.time()
            try:
                wire = await connect(str(address), port, timeout_s=self._dial_timeout_s)
            except TimeoutError:
                failure = Undeliverable(Reason.DIAL_FAILED, f"{shown}: no answer in {self._dial_timeout_s} s")
                continue
            except OSError as error:
                failure = Undeliverable(Reason.DIAL_FAILED, f"{shown}: {error.strerror}")
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
            return Delivered(wire=wire, address=address, port=port, ms=round((loop.time() - started) * 1000))
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame

    def _why_not(self, preamble: Preamble, address: Address, port: int) -> str | None:
        """Say why this address and port may not be dialled, None if it may."""
        if not self._allow.allows(address, port):
            return "is not in gateway.allow"
        why = refusal(address, self._allow)
        if why is not None:
            return f"is {why}"
        if self._guard.stops(address, port, self._discovery.mesh):
            return STOPPED
        refused = self._policy.refusal(self._flow(preamble, address, port))
        return None if refused is None else f"may not be reached: gateway.rules: {refused}"

    def _flow(self, preamble: Preamble, address: Address | None, port: int) -> Flow:
        return Flow(
            client=parse_address(preamble.client[0]),
            from_network=preamble.from_network,
            network=self._network,
            name=preamble.authority,
            address=address,
            port=port,
        )
