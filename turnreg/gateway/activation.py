"""Holding streams whose service sleeps: what wakes it is run once, and they wait for an endpoint that answers.

    stream ──▶ delivery: no endpoint, or none answers ──▶ held, until `timeout_s` from its arrival
                                                       └─▶ the rule's trigger, once for all streams of that service
    each change of the mesh, and ten times a second ──▶ one of the held streams tries ──▶ it gets through: so do all others

A trigger that succeeded is not run again for `cooldown_s`; after one that failed streams are refused at once, for a while that
doubles with every failure in a row. The relay is told how long it may take (WAITING), or it would give up after LIMIT_OPENED_S; it
gives LIMIT_WAITING_S at most. A trigger may take longer than that, and a later stream finds the service awake.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.client.contract import Discovery
from discovery.model.mesh import Mesh
from discovery.pacing.backoff import Backoff
from sniproxy.access.rules import NamePattern
from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.preamble import Preamble
from sniproxy.tunnel.state import LIMIT_WAITING_S
from turnreg.gateway.activation_trigger import Command, Trigger, TriggerError, fire
from turnreg.gateway.service_dialer import ServiceConnection, ServiceDialer, Undeliverable

log = logging.getLogger(__name__)

MAX_TIMEOUT_S = LIMIT_WAITING_S
"""What a relay waits, on top of what it waits anyway."""

DEFAULT_TIMEOUT_S = 30.0
"""A container on a machine that is there. Many clients give up by then."""
DEFAULT_RUN_TIMEOUT_S = 30.0
DEFAULT_COOLDOWN_S = 30.0
DEFAULT_MAX_HELD = 1024
DEFAULT_MAX_HELD_PER_SERVICE = 256

LOOK_EVERY_S = 0.1
"""How often a service is tried while it is awaited: a port that begins to accept tells nobody."""

MAX_RUNNING = 32
"""Triggers at once: a crowd that wants all services of a network must not start a thousand processes. The others wait."""

PAUSE_S = 0.01
"""Between two tries at least: a mesh that changes all the time must not have us dial all the time."""

BACKOFF = Backoff(1.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRule:
    """How some services are woken."""

    names: tuple[NamePattern, ...]
    """Names of services, as their records have them."""
    trigger: Trigger
    timeout_s: float = DEFAULT_TIMEOUT_S
    """How long a stream is held, from its arrival; MAX_TIMEOUT_S at most."""
    run_timeout_s: float = DEFAULT_RUN_TIMEOUT_S
    """How long the trigger may take."""
    cooldown_s: float = DEFAULT_COOLDOWN_S
    """From its success to the next time."""
    max_held: int = DEFAULT_MAX_HELD_PER_SERVICE
    """Streams held for one service."""


@dataclass(slots=True, eq=False)
class _Sleeper:
    """A service that is being woken, or was lately."""

    held: int = 0
    leading: bool = False
    """One of the held streams tries for all."""
    answers: int = 0
    """How often one of them got through."""
    running: bool = False
    failures: int = 0
    failed: bool = False
    """The last run did; not while there is another."""
    rest_until: float = 0.0
    """No run before that time of the loop."""
    stirred: asyncio.Event = field(default_factory=asyncio.Event)
    """Something may have changed: look now."""
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    """The stream that tried for all has got through, or given up; a new event each time."""

    def pass_on(self) -> None:
        """Wake all that wait for the one that tries."""
        self.turn.set()
        self.turn = asyncio.Event()

    def is_forgettable(self, now: float) -> bool:
        """Nothing that a new beginning would not know either."""
        return (
            not self.held and not self.running and now > self.rest_until + (BACKOFF.longest_s if self.failures else 0)
        )


async def _nobody(_seconds: float) -> None:
    pass


class Activation:
    """A Delivery that wakes what sleeps. `spawn` is set while the gateway runs; without it nothing is woken."""

    def __init__(
        self,
        delivery: ServiceDialer,
        discovery: Discovery,
        network: str,
        rules: tuple[ActivationRule, ...],
        max_held: int,
        *,
        registry: CollectorRegistry,
    ) -> None:
        self._delivery = delivery
        self._discovery = discovery
        self._network = network
        self.reconfigure(rules, max_held)
        self.group: asyncio.TaskGroup | None = None
        """Where triggers run: they outlive the streams that they are run for."""
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._sleepers: dict[str, _Sleeper] = {}
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
            "Streams that found their service asleep: delivered in time, given up, or not held for want of room.",
            ["result"],
            registry=registry,
        )
        self._streams = {result: streams.labels(result) for result in ("delivered", "refused", "overloaded")}
        held = Gauge("crossnet_gateway_held_streams_live", "Streams that wait for their service.", registry=registry)
        held.set_function(lambda: self._held)

    def reconfigure(self, rules: tuple[ActivationRule, ...], max_held: int) -> None:
        """Go by these for streams to come."""
        self._rules = rules
        self._max_held = max_held

    async def connect(
        self, preamble: Preamble, on_held: Callable[[float], Awaitable[None]] = _nobody
    ) -> ServiceConnection:
        """Connect to what a proven preamble asks for, and wake it if it sleeps.

        Args:
            on_held: told when the stream begins to wait, and for how many seconds at most.

        Raises:
            Undeliverable: as Delivery.connect, and overloaded; no_endpoint for a service that did not wake.
        """
        until = asyncio.get_running_loop().time()
        try:
            return await self._delivery.connect(preamble)
        except Undeliverable as error:
            rule = self._rule_for(error.asleep) if error.asleep else None
            if rule is None:
                raise
            failure = error.with_traceback(None)  # which would hold this frame
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
        sleeper = self._sleeper(failure.asleep)
        now = asyncio.get_running_loop().time()
        if sleeper.failed and now < sleeper.rest_until:
            raise _no_endpoint(failure)
        if self._held >= self._max_held or sleeper.held >= rule.max_held:
            raise Undeliverable(Reason.OVERLOADED, f"{sleeper.held} streams wait for {failure.asleep} already")
        if not sleeper.running and now >= sleeper.rest_until:
            self._begin(failure.asleep, rule, sleeper)
        if self._held == 0:
            self._unsubscribe = self._discovery.subscribe(self._stir)
        self._held += 1
        sleeper.held += 1
        try:
            async with asyncio.timeout_at(until):
                await on_held(until - now)
                return await self._awake(sleeper, failure, preamble)
        except TimeoutError:
            detail = f"{failure.detail}; nothing answered within {rule.timeout_s:g} s of waking it"
            raise Undeliverable(Reason.NO_ENDPOINT, detail) from None
        finally:
            self._held -= 1
            sleeper.held -= 1
            if self._held == 0:
                self._unsubscribe()

    def _sleeper(self, service: str) -> _Sleeper:
        sleeper = self._sleepers.get(service)
        if sleeper is None:
            now = asyncio.get_running_loop().time()
            for name in [name for name, known in self._sleepers.items() if known.is_forgettable(now)]:
                del self._sleepers[name]
            sleeper = self._sleepers[service] = _Sleeper()
        return sleeper

    def _stir(self, mesh: Mesh) -> None:
        del mesh
        for sleeper in self._sleepers.values():
            sleeper.stirred.set()

    async def _awake(self, sleeper: _Sleeper, failure: Undeliverable, preamble: Preamble) -> ServiceConnection:
        """Wait for one's turn to try for all, or for another to get through."""
        while True:
            if not sleeper.leading:
                sleeper.leading = True
                try:
                    delivered = await self._tried(sleeper, failure, preamble)
                    sleeper.answers += 1
                    return delivered
                finally:
                    sleeper.leading = False
                    sleeper.pass_on()
            answers = sleeper.answers
            await sleeper.turn.wait()
            if sleeper.answers > answers:
                try:
                    return await self._delivery.connect(preamble)
                except Undeliverable as error:
                    if not error.asleep:
                        raise
            elif sleeper.failed:
                raise _no_endpoint(failure)

    async def _tried(self, sleeper: _Sleeper, failure: Undeliverable, preamble: Preamble) -> ServiceConnection:
        """Try until the service answers."""
        while True:
            await asyncio.sleep(PAUSE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await sleeper.stirred.wait()
            sleeper.stirred.clear()
            try:
                return await self._delivery.connect(preamble)
            except Undeliverable as error:
                if not error.asleep:
                    raise
            if sleeper.failed:
                raise _no_endpoint(failure)

    def _begin(self, service: str, rule: ActivationRule, sleeper: _Sleeper) -> None:
        if self.group is None:
            return
        running = self._run(service, rule, sleeper)
        try:
            self.group.create_task(running)
        except RuntimeError:  # the gateway has just ended
            running.close()
            return
        sleeper.running = True
        sleeper.failed = False

    async def _run(self, service: str, rule: ActivationRule, sleeper: _Sleeper) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        result, detail = "ok", ""
        try:
            async with self._slots:
                started = loop.time()
                await fire(rule.trigger, service, self._network, timeout_s=rule.run_timeout_s)
        except TriggerError as error:
            result, detail = "timeout" if error.timed_out else "failed", error.detail
        except Exception as error:  # one trigger's defect must not end the gateway
            log.exception("activation_error", extra={"event": {"service": service}})
            result, detail = "failed", str(error)
        finally:
            sleeper.running = False
            sleeper.stirred.set()
        now = loop.time()
        if result == "ok":
            sleeper.failures, rest_s = 0, rule.cooldown_s
        else:
            sleeper.failures += 1
            sleeper.failed = True
            rest_s = BACKOFF.pause_s(sleeper.failures)
        sleeper.rest_until = now + rest_s
        self._runs[result].inc()
        by = "command" if isinstance(rule.trigger, Command) else "url"
        event = {"service": service, "by": by, "result": result, "ms": round((now - started) * 1000)}
        if detail:
            event |= {"detail": detail, "retry_s": round(rest_s, 1)}
        log.log(logging.WARNING if detail else logging.INFO, "activation", extra={"event": event})


def _no_endpoint(failure: Undeliverable) -> Undeliverable:
    # What the trigger said is in our log; the other network, to which this goes, has no business with it.
    return Undeliverable(Reason.NO_ENDPOINT, f"{failure.detail}; waking it failed")
