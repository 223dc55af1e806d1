"""Reach one of a service's endpoints: the one whose turn it is, or the next that answers."""

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.model.addresses import format_endpoint, parse_address
from sniproxy.endpoints.health import Endpoint, EndpointHealth
from sniproxy.engine.local_ports import NoLocalPort
from sniproxy.engine.staggered_connect import (
    MIN_STAGGER_S,
    STAGGER_S,
    FirstConnected,
    HeadStart,
    connect_first,
    stagger,
)

log = logging.getLogger(__name__)

LIMIT_S: Final = 9.0
"""For all endpoints of a service together: within the 10 s that a relay waits for a gateway (tunnel.state.LIMIT_OPENED_S)."""

MAX_SHOWN: Final = 100
"""Endpoints that the status names: those that fail most often. The metrics have the number of all."""

MAX_FAILURES_TOLD: Final = 3
"""Endpoints that an error names one by one."""


class NoAnswer(OSError):
    """No endpoint could be reached, or none was left to try."""

    def __init__(self, detail: str, attempts: int) -> None:
        super().__init__(detail)
        self.detail = detail
        self.attempts = attempts
        """How many were dialled."""


class ConnectFirst(Protocol):
    """`connect_first`, or what a test puts in its place."""

    def __call__(
        self,
        endpoints: Iterator[Endpoint],
        *,
        timeout_s: float,
        limit_s: float,
        on_failed: Callable[[Endpoint, OSError], None],
        head_start_s: HeadStart = stagger,
    ) -> Awaitable[FirstConnected | None]: ...


class Attempts:
    """One stream's tries at the endpoints of one service. `connect` may be called again: it goes on behind the last one."""

    def __init__(
        self, dialer: "EndpointDialer", service: str, endpoints: Iterator[Endpoint], count: int, connect: ConnectFirst
    ) -> None:
        self._dialer = dialer
        self._service = service
        self._endpoints = endpoints
        self._connect = connect
        # Many are tried faster, so that those at the end are still reached in time.
        self._stagger_s = max(MIN_STAGGER_S, min(STAGGER_S, LIMIT_S / max(count, 1)))
        self.made = 0
        """How many endpoints were dialled."""
        self._failures: list[str] = []

    async def connect(self, *, timeout_s: float) -> FirstConnected:
        """Connect to the first endpoint that answers, within `timeout_s` seconds for each, and LIMIT_S for all if that is more.

        Raises:
            NoAnswer: none did.
        """
        failed_before = len(self._failures)
        connected = await self._connect(
            self._endpoints,
            timeout_s=timeout_s,
            limit_s=max(timeout_s, LIMIT_S),
            head_start_s=self._head_start_s,
            on_failed=self._on_failed,
        )
        if connected is None:
            self.made += len(self._failures) - failed_before
            raise NoAnswer(self._summary(), self.made)
        self.made += connected.attempts
        if self._service:
            self._dialer.note_success(self._service, connected.endpoint)
        return connected

    def _head_start_s(self, endpoint: Endpoint) -> float:
        return MIN_STAGGER_S if self._dialer.health.is_doubtful(endpoint) else self._stagger_s

    def reject(self, endpoint: Endpoint, why: str) -> None:
        """Count an endpoint that was connected to as failed after all."""
        self._failures.append(f"{_shown(endpoint)}: {why}")
        if self._service:
            self._dialer.note_failure(self._service, endpoint, why)

    def _on_failed(self, endpoint: Endpoint, error: OSError) -> None:
        why = error.strerror or str(error)  # the text alone: the error's traceback would make a cycle
        if isinstance(error, NoLocalPort):
            self._failures.append(f"{_shown(endpoint)}: {why}")  # says nothing about the endpoint
        else:
            self.reject(endpoint, why)

    def _summary(self) -> str:
        more = len(self._failures) - MAX_FAILURES_TOLD
        return "; ".join(self._failures[:MAX_FAILURES_TOLD]) + (f"; and {more} more" if more > 0 else "")


class EndpointDialer:
    """Dials the endpoints of services for a relay or a gateway, and remembers which of them answer."""

    def __init__(
        self,
        role: str,
        registry: CollectorRegistry,
        *,
        clock: Callable[[], float] = time.monotonic,
        connect: ConnectFirst = connect_first,
    ) -> None:
        """Start with every endpoint counted as healthy.

        Args:
            role: "relay" or "gateway", for the names of metrics.
        """
        self._connect = connect
        self.health = EndpointHealth(clock)
        left_out = Gauge(
            f"crossnet_{role}_endpoints_left_out",
            "Endpoints of services that are tried last, because they failed of late.",
            registry=registry,
        )
        left_out.set_function(lambda: self.health.left_out)
        self._failures = Counter(
            f"crossnet_{role}_endpoint_failures",
            "Endpoints of services that did not answer a dial.",
            registry=registry,
        )

    def attempts(self, service: str, endpoints: Sequence[Endpoint], allowed: Callable[[Endpoint], bool]) -> Attempts:
        """Begin a stream's tries.

        Args:
            service: whose endpoints they are; each service has its own turn. Empty for an address: there is no other to go to,
                so nothing is remembered of it.
            allowed: asked of each endpoint when it is to be dialled.
        """
        order = self.health.order(service, endpoints) if service else iter(endpoints)
        return Attempts(self, service, filter(allowed, order), len(endpoints), self._connect)

    def note_success(self, service: str, endpoint: Endpoint, *, by_check: bool = False) -> None:
        """Count an endpoint as healthy."""
        if self.health.succeeded(endpoint, by_check=by_check):
            log.info("endpoint_back", extra={"event": {"service": service, "endpoint": _shown(endpoint)}})

    def note_failure(self, service: str, endpoint: Endpoint, why: str, *, next_check_s: float | None = None) -> None:
        """Leave an endpoint out for a while: as `EndpointHealth.failed`."""
        self._failures.inc()
        left_out = self.health.failed(endpoint, why, next_check_s=next_check_s)
        if left_out is not None:
            event = {
                "service": service,
                "endpoint": _shown(endpoint),
                "detail": why,
                "failures": left_out.failures,
                "seconds": left_out.seconds,
            }
            log.warning("endpoint_left_out", extra={"event": event})

    def status(self) -> list[dict[str, Any]]:
        """Describe the endpoints that fail."""
        return list(self.health.status(MAX_SHOWN))


def _shown(endpoint: Endpoint) -> str:
    address, port = endpoint
    return format_endpoint(parse_address(address), port)
