"""Waking services on demand: streams for a sleeping service are held while its trigger runs once.

    stream ──▶ dialer: no endpoint, or none answers ──▶ held, until `timeout_s` from its arrival
                                                       └─▶ the rule's trigger, once for all streams of that service
    each change of the mesh, and ten times a second ──▶ one of the held streams tries ──▶ if it connects, all others do

A trigger that succeeded does not run again for `cooldown_s`. After a trigger that failed, streams are refused at once, for a time
that doubles with every failure in a row. The relay is told how long it may have to wait (WAITING), since it would otherwise give up
after LIMIT_OPENED_S; it waits LIMIT_WAITING_S at most. A trigger may take longer than that; a later stream then finds the service
awake.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.client.contract import Discovery
from discovery.model.mesh import Mesh
from sniproxy.access.name_pattern import NamePattern
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.preamble import Preamble
from sniproxy.tunnel.state import LIMIT_WAITING_S
from turnreg.gateway.activation_trigger import Command, Trigger, TriggerError, fire
from turnreg.gateway.limits import GatewayLimits
from turnreg.gateway.service_dialer import ServiceConnection, ServiceDialer, Undeliverable

log = logging.getLogger(__name__)

MAX_TIMEOUT_S = LIMIT_WAITING_S
"""How much longer a relay waits after WAITING than it does anyway."""

DEFAULT_TIMEOUT_S = 30.0
"""Enough for a container on a machine that is running. Many clients give up by then."""
DEFAULT_RUN_TIMEOUT_S = 30.0
DEFAULT_COOLDOWN_S = 30.0
DEFAULT_MAX_HELD = 1024
DEFAULT_MAX_HELD_PER_SERVICE = 256

LOOK_EVERY_S = 0.1
"""Period of polling a service while streams wait: there is no event for a port that starts to accept."""

PAUSE_S = 0.01
"""Shortest time between two polls, so that a mesh that changes all the time does not make us dial all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRule:
    """How services with certain names are woken."""

    names: tuple[NamePattern, ...]
    """Names of services, as in their records."""
    trigger: Trigger
    timeout_s: float = DEFAULT_TIMEOUT_S
    """How long a stream is held, counted from its arrival; at most MAX_TIMEOUT_S."""
    run_timeout_s: float = DEFAULT_RUN_TIMEOUT_S
    """Timeout for the trigger."""
    cooldown_s: float = DEFAULT_COOLDOWN_S
    """How long the trigger does not run again after a success."""
    max_held: int = DEFAULT_MAX_HELD_PER_SERVICE
    """Most streams held for one service."""


@dataclass(slots=True, eq=False)
class WakeState:
    """State of a service that is being woken, or was woken recently."""

    held: int = 0
    leading: bool = False
    """One of the held streams polls the service for all of them."""
    answers: int = 0
    """How often the stream that polls has connected."""
    running: bool = False
    failures: int = 0
    failed: bool = False
    """The last run failed. False while another one runs."""
    rest_until: float = 0.0
    """No run before this time of the loop's clock."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service may have become reachable: poll it now."""
    leader_done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the stream that polls has connected or given up. A new event each time."""

    def wake_followers(self) -> None:
        """Wake the streams that wait for the one that polls."""
        self.leader_done.set()
        self.leader_done = asyncio.Event()

    def is_forgettable(self, now: float, longest_pause_s: float) -> bool:
        """Tell whether this state can be dropped. After failures it is kept until the longest pause is over, too."""
        return not self.held and not self.running and now > self.rest_until + (longest_pause_s if self.failures else 0)


async def _nobody(_seconds: float) -> None:
    pass


class Activation:
    """Wraps a ServiceDialer and wakes services. `group` is set while the gateway runs; without it nothing is woken."""

    def __init__(
        self,
        dialer: ServiceDialer,
        discovery: Discovery,
        network: str,
        rules: tuple[ActivationRule, ...],
        max_held: int,
        *,
        limits: GatewayLimits,
        registry: CollectorRegistry,
    ) -> None:
        self._dialer = dialer
        self._discovery = discovery
        self._network = network
        self.reconfigure(rules, max_held)
        self.group: asyncio.TaskGroup | None = None
        """Where triggers run: a trigger outlives the stream that started it."""
        self._slots = asyncio.Semaphore(limits.max_triggers)
        self._backoff = limits.trigger_backoff
        self._wake_states: dict[str, WakeState] = {}
        self._held = 0
        self._unsubscribe: Callable[[], None] = lambda: None
        runs = Counter(
            "crossnet_gateway_activations",
            "Commands run and calls made to wake services.",
            ["result"],
            registry=registry,
        )
        self._runs = {result: runs.labels(result) for result in ("ok", "failed", "timeout")}
        streams = Counter(
            "crossnet_gateway_held_streams",
            "Streams whose service was asleep: delivered in time, refused, or not held because too many were.",
            ["result"],
            registry=registry,
        )
        self._streams = {result: streams.labels(result) for result in ("delivered", "refused", "overloaded")}
        held = Gauge("crossnet_gateway_held_streams_live", "Streams that wait for their service.", registry=registry)
        held.set_function(lambda: self._held)

    def reconfigure(self, rules: tuple[ActivationRule, ...], max_held: int) -> None:
        """Use these for new streams."""
        self._rules = rules
        self._max_held = max_held

    async def connect(
        self, preamble: Preamble, on_held: Callable[[float], Awaitable[None]] = _nobody
    ) -> ServiceConnection:
        """Connect to the target of a verified preamble, and wake its service if necessary.

        Args:
            on_held: called when the stream starts to wait, with the most seconds that this will take.

        Raises:
            Undeliverable: as ServiceDialer.connect; also overloaded, and no_endpoint for a service that did not wake.
        """
        until = asyncio.get_running_loop().time()
        try:
            return await self._dialer.connect(preamble)
        except Undeliverable as error:
            rule = self._rule_for(error.asleep) if error.asleep else None
            if rule is None:
                raise
            failure = error.with_traceback(None)  # a traceback would keep this frame alive
        until += rule.timeout_s
        try:
            delivered = await self._hold(failure, rule, preamble, until, on_held)
        except Undeliverable as error:
            self._streams["overloaded" if error.reason is Reason.OVERLOADED else "refused"].inc()
            raise
        self._streams["delivered"].inc()
        return delivered

    def _rule_for(self, service: str) -> ActivationRule | None:
        return next((rule for rule in self._rules if any(name.matches(service) for name in rule.names)), None)

    async def _hold(
        self,
        failure: Undeliverable,
        rule: ActivationRule,
        preamble: Preamble,
        until: float,
        on_held: Callable[[float], Awaitable[None]],
    ) -> ServiceConnection:
        wake = self._wake_state(failure.asleep)
        now = asyncio.get_running_loop().time()
        if wake.failed and now < wake.rest_until:
            raise _no_endpoint(failure)
        if self._held >= self._max_held or wake.held >= rule.max_held:
            raise Undeliverable(Reason.OVERLOADED, f"{wake.held} streams already wait for {failure.asleep}")
        if not wake.running and now >= wake.rest_until:
            self._begin(failure.asleep, rule, wake)
        if self._held == 0:
            self._unsubscribe = self._discovery.subscribe(self._on_mesh)
        self._held += 1
        wake.held += 1
        try:
            async with asyncio.timeout_at(until):
                await on_held(until - now)
                return await self._wait_for_service(wake, failure, preamble)
        except TimeoutError:
            detail = f"{failure.detail}; nothing answered within {rule.timeout_s:g} s of waking it"
            raise Undeliverable(Reason.NO_ENDPOINT, detail) from None
        finally:
            self._held -= 1
            wake.held -= 1
            if self._held == 0:
                self._unsubscribe()

    def _wake_state(self, service: str) -> WakeState:
        wake = self._wake_states.get(service)
        if wake is None:
            now, longest_s = asyncio.get_running_loop().time(), self._backoff.longest_s
            for name in [name for name, known in self._wake_states.items() if known.is_forgettable(now, longest_s)]:
                del self._wake_states[name]
            wake = self._wake_states[service] = WakeState()
        return wake

    def _on_mesh(self, mesh: Mesh) -> None:
        del mesh
        for wake in self._wake_states.values():
            wake.changed.set()

    async def _wait_for_service(self, wake: WakeState, failure: Undeliverable, preamble: Preamble) -> ServiceConnection:
        """Wait until another stream has connected, or become the one that polls for all."""
        while True:
            if not wake.leading:
                wake.leading = True
                try:
                    delivered = await self._poll_service(wake, failure, preamble)
                    wake.answers += 1
                    return delivered
                finally:
                    wake.leading = False
                    wake.wake_followers()
            answers = wake.answers
            await wake.leader_done.wait()
            if wake.answers > answers:
                try:
                    return await self._dialer.connect(preamble)
                except Undeliverable as error:
                    if not error.asleep:
                        raise
            elif wake.failed:
                raise _no_endpoint(failure)

    async def _poll_service(self, wake: WakeState, failure: Undeliverable, preamble: Preamble) -> ServiceConnection:
        """Poll the service until it answers."""
        while True:
            await asyncio.sleep(PAUSE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await wake.changed.wait()
            wake.changed.clear()
            try:
                return await self._dialer.connect(preamble)
            except Undeliverable as error:
                if not error.asleep:
                    raise
            if wake.failed:
                raise _no_endpoint(failure)

    def _begin(self, service: str, rule: ActivationRule, wake: WakeState) -> None:
        if self.group is None:
            return
        running = self._run(service, rule, wake)
        try:
            self.group.create_task(running)
        except RuntimeError:  # the gateway has just stopped
            running.close()
            return
        wake.running = True
        wake.failed = False

    async def _run(self, service: str, rule: ActivationRule, wake: WakeState) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        result, detail = "ok", ""
        try:
            async with self._slots:
                started = loop.time()
                await fire(rule.trigger, service, self._network, timeout_s=rule.run_timeout_s)
        except TriggerError as error:
            result, detail = "timeout" if error.timed_out else "failed", error.detail
        except Exception as error:  # a bug in one trigger must not end the gateway
            log.exception("activation_error", extra={"event": {"service": service}})
            result, detail = "failed", str(error)
        finally:
            wake.running = False
            wake.changed.set()
        now = loop.time()
        if result == "ok":
            wake.failures, rest_s = 0, rule.cooldown_s
        else:
            wake.failures += 1
            wake.failed = True
            rest_s = self._backoff.pause_s(wake.failures)
        wake.rest_until = now + rest_s
        self._runs[result].inc()
        by = "command" if isinstance(rule.trigger, Command) else "url"
        event = {"service": service, "by": by, "result": result, "ms": round((now - started) * 1000)}
        if detail:
            event |= {"detail": detail, "retry_s": round(rest_s, 1)}
        log.log(logging.WARNING if detail else logging.INFO, "activation", extra={"event": event})


def _no_endpoint(failure: Undeliverable) -> Undeliverable:
    # The trigger's output is in our log only: this detail is sent to another network.
    return Undeliverable(Reason.NO_ENDPOINT, f"{failure.detail}; waking it failed")
