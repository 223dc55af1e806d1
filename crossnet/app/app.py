"""The roles of one configuration: started in order, each when what it asks at its start is there, served, drained, ended.

Draining: readiness goes, records are withdrawn, listeners close once clients have had time to look elsewhere, streams may end.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, Info, PlatformCollector, ProcessCollector

from crossnet import logs
from crossnet.admin.inspection import Inspection
from crossnet.admin.server import AdminServer
from crossnet.app import role_configs
from crossnet.app.auto_ports import AdaptivePorts
from crossnet.app.discovery_client import open_discovery
from crossnet.app.publication import RelayPublication, publish_turn_servers
from crossnet.app.readiness import ReadinessMetric
from crossnet.config.file import warnings
from crossnet.config.reload import Refused, Reloader
from crossnet.config.sections import Config, DnsSection, GatewaySection, PublisherSection, RelaySection
from crossnet.handover import READY_LOOK_S, READY_TIMEOUT_S, Inherited, Offer, Place
from discovery.api import DiscoveryServer, DiscoveryServerConfig, ServerRefused
from discovery.client.client import DiscoveryClient
from discovery.client.contract import Discovery
from discovery.client.merged import MergedDiscovery
from discovery.files.yaml_file import BadFile
from discovery.model.addresses import format_endpoint, parse_address
from discovery.model.mesh import Kind, VipSpec
from discovery.publisher import Publisher
from discovery.store import StoreError
from dnsgw.config import DEFAULT_TTL_S, DnsConfig
from dnsgw.server import DnsServer
from sniproxy.relay.relay import Relay
from sniproxy.tunnel.keys import SigningKeys
from turnreg.gateway.gateway import Gateway
from turnreg.registrar.registrar import Registrar
from turnreg.server.server import TurnServer

T = TypeVar("T")

log = logging.getLogger("crossnet")

FORGET_S = 2.0
"""On top of the TTL of our DNS answers, for resolvers on the client's side that round it up (design, section 9). Relays have heard
of a change in discovery by then, too."""

CLOSE_TIMEOUT_S = 5.0
"""What giving allocations and records back may take together; leases end by themselves."""


DRAIN_LOOK_S = 0.1

ADAPTED = "relay's services"
"""What sockets are called at a handover that a relay has opened for the ports of services."""


class StartError(Exception):
    """A role cannot start; the text says which one and why."""


class App:
    """The running process. `serve` ends when `stop` has been called and everything is drained."""

    def __init__(self, config: Config, chosen: Sequence[str], path: Path | None = None) -> None:
        """Take the configuration, and the file that it is read from anew when that changes."""
        self.config = config
        self.chosen = tuple(chosen)
        self._speaks_for_turn_servers = "turn_servers" in chosen or set(chosen) == set(config.roles)
        self._bound: dict[str, list[tuple[str, int]]] = {}
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        Info("crossnet_build", "What runs.", registry=self.registry).info({"version": version("crossnet")})
        self.discovery: Discovery | None = None
        self.relay: Relay | None = None
        self.gateway: Gateway | None = None
        self.turn: TurnServer | None = None
        self.discovery_server: DiscoveryServer | None = None
        self.registrar: Registrar | None = None
        self._dns: DnsServer | None = None
        self.publisher: Publisher | None = None
        self._publication: RelayPublication | None = None
        self._group = asyncio.TaskGroup()
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self.started_at = time.time()
        self.started = False
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._inherited = Inherited()
        self._handed_over = False
        self._longer_ttl_until = 0.0
        """How long answers live on that were given with a longer TTL than those of now, in the loop's time."""

        self.reloader = Reloader(path, config, self._apply, self.registry) if path is not None else None

    @property
    def handed_over(self) -> bool:
        """Whether another process has taken our place."""
        return self._handed_over

    @property
    def stopping(self) -> bool:
        """Whether it drains, or has ended."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Drain and end; asked a second time, end at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def serve(self) -> None:
        """Start, serve until stopped, drain.

        Raises:
            StartError: a role cannot start.
            ExceptionGroup: a role died of something unexpected.
        """
        if self.config.handover is not None:
            self._inherited = await self._begin("handover", asyncio.to_thread(Inherited.receive, self.config.handover))
        admin = AdminServer(Inspection(self))
        self.registry.register(ReadinessMetric(self))
        where = str(self.config.admin.address), self.config.admin.port
        try:
            await self._begin("admin", admin.open(*where, self._inherited.take("admin", *where)))
            self._note("admin", [admin.address])
            async with self._group:
                try:
                    self._run("admin", admin.run())
                    await self._start()
                    self.started = True
                    if self._inherited:
                        registrar = self.registrar
                        await self._begin(
                            "handover", self._until("allocations", lambda: not registrar or registrar.settled)
                        )
                    await self._inherited.started()
                    if self.gateway is not None:
                        self.gateway.accept()
                    if self.config.handover is not None:
                        self._run("handover", self._hand_over(self.config.handover, admin))
                    if self.reloader is not None:
                        self._run("reloader", self.reloader.run())
                    log.info("started", extra={"event": {"roles": self.chosen, "listening": self.listening}})
                    await self._stopping.wait()
                    await self._drain()
                    await self._give_back()
                finally:
                    for task in self._tasks.values():
                        task.cancel()
        finally:
            self._inherited.close()
            await admin.close()
        log.info("ended", extra={"event": {"seconds": time.time() - self.started_at}})

    def _apply(self, config: Config) -> None:
        """Go by this configuration from now on; it differs only in what needs no restart. Whatever it raises, all is as before."""
        old = self.config
        try:
            for part in list(self._parts(old, config)):  # each is made before the first one changes anything
                part()
        except Exception:
            for part in self._parts(config, old):
                try:
                    part()
                except Exception:
                    log.exception("reload_not_undone", extra={"event": {"detail": "a part may go by the new file"}})
            raise
        if _ttl_s(config) < _ttl_s(old):
            lives_until = asyncio.get_running_loop().time() + _ttl_s(old)
            self._longer_ttl_until = max(self._longer_ttl_until, lives_until)
        self.config = config
        for warning in warnings(config):
            log.warning("%s", warning)

    def _parts(self, old: Config, config: Config) -> Iterator[Callable[[], None]]:
        """Yield what makes each part that runs go by `config`, where `old` was."""
        keys = role_configs.keys(config)
        if self._dns is not None and config.dns is not None:  # the first: it may refuse
            yield partial(self._reconfigure_dns, self._dns, role_configs.dns_config(config, config.dns))
        style, level, refused_per_s = config.log.format, config.log.level, config.log.refused_per_second
        yield partial(logs.set_up, style=style, level=level, refused_per_s=refused_per_s)
        if isinstance(self.discovery, DiscoveryClient | MergedDiscovery):
            yield partial(self.discovery.use_token, config.token.text if config.token else None)
        if self.discovery_server is not None and config.discovery_server is not None:
            server = role_configs.discovery_server_config(config, config.discovery_server)
            yield partial(self.discovery_server.reconfigure, server)
        if self.turn is not None and config.turn is not None:
            yield partial(self.turn.reconfigure, role_configs.turn_config(config, config.turn))
        if old.turn_servers != config.turn_servers and self._speaks_for_turn_servers:
            yield partial(self._publish_turn_servers, old, config)
        if self.relay is not None and config.relay is not None:
            relay = role_configs.relay_config(config, config.relay, self.relay.config.guard)
            yield partial(self.relay.reconfigure, relay, SigningKeys(keys))
        if self._publication is not None:
            yield partial(self._publication.reconfigure, config)
        if self.gateway is not None and config.gateway is not None:
            gateway = role_configs.gateway_config(config, config.gateway, self.gateway.config.guard)
            yield partial(self.gateway.reconfigure, gateway, keys)
            if self.registrar is not None:
                registrar = role_configs.registrar_config(
                    config, config.gateway, self._guard(), epoch=self.gateway.epoch
                )
                yield partial(self.registrar.reconfigure, registrar)
            elif config.gateway.turn:
                yield partial(self._start_registrar, config, self.gateway, config.gateway)

    def _reconfigure_dns(self, dns: DnsServer, config: DnsConfig) -> None:
        try:
            dns.reconfigure(config)
        except (OSError, ValueError) as error:
            raise Refused(f"$.dns: {error}") from error

    def _publish_turn_servers(self, old: Config, config: Config) -> None:
        if self.discovery is None:
            raise Refused("$.turn_servers: expected a restart, since no role of this process speaks to discovery yet")
        publish_turn_servers(config, self.discovery, instead_of=old)
        others = [role for role in self.chosen if role != "turn_servers"]
        self.chosen = (*others, *(["turn_servers"] if config.turn_servers else []))

    async def _start(self) -> None:
        config, chosen = self.config, self.chosen
        if "discovery_server" in chosen and config.discovery_server is not None:
            await self._start_discovery_server(role_configs.discovery_server_config(config, config.discovery_server))
        turn = None
        if "turn" in chosen and config.turn is not None:
            opening = TurnServer.open(role_configs.turn_config(config, config.turn), registry=self.registry)
            turn = self.turn = await self._begin("turn", opening)
            self._note("turn", (*turn.addresses, *turn.tls_addresses, *turn.udp_addresses))
            self._run("turn", turn.run())
        if not set(chosen) - {"discovery_server"}:
            return
        discovery = self.discovery = await self._begin("discovery", open_discovery(config, self.registry))
        self._run("discovery", discovery.run())
        if self._inherited:  # clients come from the first moment: none must be told that we know of no network
            await self._begin("handover", self._until("a view of discovery", lambda: discovery.synced))
        if turn is not None and config.turn is not None:
            listening = (*turn.addresses, *turn.tls_addresses)
            spec = role_configs.turn_spec(config.turn, listening[0], tls=not turn.addresses)
            discovery.publish(Kind.TURN, config.turn.id, spec)
        if "turn_servers" in chosen:
            publish_turn_servers(config, discovery)
        if "dns" in chosen and config.dns is not None:
            await self._start_dns(discovery, config.dns)
        if "relay" in chosen and config.relay is not None:
            await self._start_relay(discovery, config.relay)
        if "gateway" in chosen and config.gateway is not None:
            await self._start_gateway(discovery, config.gateway)
        if "publisher" in chosen and config.publisher is not None:
            await self._start_publisher(discovery, config.publisher)

    async def _start_discovery_server(self, config: DiscoveryServerConfig) -> None:
        server = DiscoveryServer(config, registry=self.registry)
        opened: asyncio.Future[tuple[tuple[str, int], ...]] = asyncio.get_running_loop().create_future()

        async def hold() -> None:
            # The server's own tasks live in this context, which must be left by the task that entered it.
            try:
                async with server.serving() as addresses:
                    self.discovery_server = server
                    opened.set_result(addresses)
                    await asyncio.get_running_loop().create_future()
            except Exception as error:
                if opened.done():
                    raise
                opened.set_exception(error)

        self._run("discovery_server", hold())
        self._note("discovery_server", await self._begin("discovery_server", opened))

    async def _start_publisher(self, discovery: Discovery, section: PublisherSection) -> None:
        async def opened() -> Publisher:
            return Publisher(role_configs.publisher_config(self.config, section), discovery, registry=self.registry)

        self.publisher = await self._begin("publisher", opened())
        self._run("publisher", self.publisher.run())

    async def _start_dns(self, discovery: Discovery, section: DnsSection) -> None:
        def claim(id: str, spec: VipSpec) -> None:  # noqa: A002 - the word of the design
            discovery.publish(Kind.VIP, id, spec, leased=False, if_absent=True)

        dns = DnsServer(role_configs.dns_config(self.config, section), registry=self.registry, claim=claim)
        await self._begin("dns", dns.open())
        self._note("dns", [(str(address), port) for address, port in dns.addresses])
        discovery.subscribe(dns.apply)
        if discovery.synced:
            dns.apply(discovery.mesh)
        self._dns = dns
        self._run("dns", dns.run())

    async def _start_relay(self, discovery: Discovery, section: RelaySection) -> None:
        config = role_configs.relay_config(self.config, section, self._guard())
        relay = Relay(config, discovery, SigningKeys(role_configs.keys(self.config)), registry=self.registry)
        await self._begin("relay", relay.open(partial(self._inherited.take, "relay")))
        if section.ports == "auto":
            for sock in self._inherited.rest(ADAPTED):
                relay.adopt(sock)
        self._note("relay", relay.addresses)
        self.relay = relay
        self._run("relay", relay.run())
        addresses = [str(address) for address in section.advertise] or _unique(
            address for address, _ in relay.addresses
        )
        ports = _unique(port for _, port in relay.addresses)
        self._publication = RelayPublication(self.config, discovery, ports, addresses, self.registry)
        self._run("publication", self._publication.run())
        if section.ports == "auto":
            adaptive = AdaptivePorts(relay, discovery, section.port_range, self._publication.set_ports)
            self._run("ports", adaptive.run())

    async def _start_gateway(self, discovery: Discovery, section: GatewaySection) -> None:
        config = role_configs.gateway_config(self.config, section, self._guard())
        gateway = Gateway(config, discovery, role_configs.keys(self.config), registry=self.registry)
        if self._inherited:
            gateway.hold()  # until our predecessor has stopped: its epoch is another one
        await self._begin("gateway", gateway.open(partial(self._inherited.take, "gateway")))
        self._note("gateway", gateway.addresses)
        self.gateway = gateway
        self._run("gateway", gateway.run())
        if gateway.addresses:
            discovery.publish(
                Kind.GATEWAY, section.id, role_configs.gateway_spec(section, gateway.addresses[0], gateway.epoch)
            )
        if section.turn:
            self._start_registrar(self.config, gateway, section)

    def _start_registrar(self, config: Config, gateway: Gateway, section: GatewaySection) -> None:
        assert self.discovery is not None
        registrar = role_configs.registrar_config(config, section, self._guard(), epoch=gateway.epoch)
        self.registrar = Registrar(registrar, self.discovery, self.registry)
        self._run("registrar", self.registrar.run(gateway.take))

    async def _hand_over(self, path: Path, admin: AdminServer) -> None:
        """Wait for a successor, then drain; what it has published by then is its own."""

        def sockets() -> Iterator[tuple[Place, int]]:
            yield ("admin", str(self.config.admin.address), self.config.admin.port), admin.fileno()
            for role, server in (("relay", self.relay), ("gateway", self.gateway)):
                for place, number in server.listening() if server is not None else ():
                    yield (role, *place), number
            for place, number in self.relay.adapted() if self.relay is not None else ():
                yield (ADAPTED, *place), number

        def stop_accepting() -> None:
            if self.relay is not None:
                self.relay.close()
            if self.gateway is not None:
                self.gateway.stop_listening()

        def offered(out: bool) -> None:
            # A successor writes our records as its own: that is no stranger with our id.
            if isinstance(self.discovery, DiscoveryClient | MergedDiscovery):
                self.discovery.expect_successor(out)

        offer = Offer(path, sockets, stop_accepting, offered)
        try:
            offer.open()
            await offer.run()
        except OSError as error:
            log.error("handover_failed", extra={"event": {"detail": str(error)}})
            return
        finally:
            offer.close()
        self._handed_over = True
        for name in self._tasks.keys() & {"publication", "ports"}:
            self._tasks[name].cancel()  # or our record might come in place of our successor's
        self._stopping.set()
        await admin.close()

    def _guard(self) -> list[tuple[str, int]]:
        """Where this process listens so far, and discovery servers do: no stream goes there."""
        bound = [endpoint for endpoints in self._bound.values() for endpoint in endpoints]
        return bound + role_configs.discovery_endpoints(self.config)

    def _remembered_until(self, now: float) -> float:
        """Until when, in the loop's time, clients may come by what resolvers answered before `now`."""
        return max(now + _ttl_s(self.config), self._longer_ttl_until) + FORGET_S

    async def _drain(self) -> None:
        """Withdraw, let clients look elsewhere, take nothing new, wait for the streams: `drain` in all."""
        event = {
            "seconds": self.config.drain_s,
            "streams": self._streams_open(),
            "hint": "a second signal ends at once",
        }
        log.info("draining", extra={"event": event})
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.drain_s
        if self._publication is not None and not self._handed_over:
            self._publication.withdraw()
        if self.registrar is not None:
            if self._handed_over:
                self.registrar.hand_over()
            else:
                self.registrar.drain()
        direct = self.gateway is not None and self.gateway.addresses and not self._handed_over
        if direct and self.config.gateway is not None:
            assert self.discovery is not None
            self.discovery.withdraw(Kind.GATEWAY, self.config.gateway.id)
        if self.turn is not None and self.config.turn is not None:
            if not self._handed_over and self.discovery is not None:
                self.discovery.withdraw(Kind.TURN, self.config.turn.id)
            self.turn.drain()
        if (
            self._publication is not None
            and not self._handed_over
            and (self.config.static_mesh is None or self._dns is not None)
        ):
            # Somebody's resolver has named us until now, and its answers live on for a while.
            await self._hurried_after(min(self._remembered_until(loop.time()), deadline) - loop.time())
        elif self._handed_over and self.registrar is not None:
            # Relays that have not heard of our successor's allocations yet come to ours.
            await self._hurried_after(min(FORGET_S, deadline - loop.time()))
        waiting = []
        for role, server in (("relay", self.relay), ("gateway", self.gateway)):
            if server is not None:
                server.close()
                waiting.append(self._tasks[role])
        while loop.time() < deadline and not self._hurry.is_set():
            if all(task.done() for task in waiting) and (self.turn is None or not self.turn.streams):
                break
            await self._hurried_after(min(DRAIN_LOOK_S, deadline - loop.time()))
        if left := self._streams_open():
            log.warning("cut", extra={"event": {"streams": left}})

    async def _give_back(self) -> None:
        """Return allocations and records, so that nobody comes for what is no longer here."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if self.registrar is not None:
                    await self.registrar.close()
                if self._dns is not None:
                    await self._dns.close()
                if self.discovery is not None:
                    self._tasks["discovery"].cancel()
                    await asyncio.wait([self._tasks["discovery"]])
                    await self.discovery.close()

    async def _hurried_after(self, pause_s: float) -> None:
        """Wait, but not when somebody has asked for the end a second time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._hurry.wait()

    async def _until(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait for what a successor must have before its predecessor may go. Raises TimeoutError."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not holds():
                    await asyncio.sleep(READY_LOOK_S)
        except TimeoutError:
            raise TimeoutError(f"without {what} for {READY_TIMEOUT_S:g} s: the process before us goes on") from None

    async def _begin(self, role: str, opening: Awaitable[T]) -> T:
        try:
            return await opening
        except (OSError, ValueError, StoreError, ServerRefused, BadFile) as error:
            raise StartError(f"{role}: {error}") from error

    def _run(self, name: str, running: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = self._group.create_task(running, name=name)

    def _note(self, role: str, addresses: Iterable[tuple[str, int]]) -> None:
        self._bound[role] = list(addresses)

    @property
    def listening(self) -> dict[str, list[str]]:
        """Where each role listens, with the ports that were chosen for 0."""
        return {
            role: [format_endpoint(parse_address(address), port) for address, port in bound]
            for role, bound in self._bound.items()
            if bound
        }

    @property
    def relay_sources(self) -> list[dict[str, object]]:
        """Which address each TURN server of this network sees our relay come from, and how we know."""
        return self._publication.sources() if self._publication is not None else []

    @property
    def upstreams(self) -> list[dict[str, object]]:
        """What the resolver knows of those that it asks."""
        return self._dns.status() if self._dns is not None else []

    def _streams_open(self) -> int:
        ours = sum(len(server.ledger) for server in (self.relay, self.gateway) if server is not None)
        return ours + (self.turn.streams if self.turn is not None else 0)


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))


def _ttl_s(config: Config) -> int:
    """How long an answer of this network's resolvers lives."""
    return config.dns.ttl_s if config.dns is not None else DEFAULT_TTL_S
