"""The resolver of a network as a server: its sockets, and the wiring of its parts."""

import asyncio
import errno
import logging
import ssl
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from discovery.files.fingerprint import Fingerprint, fingerprint
from discovery.model.addresses import Address, format_endpoint
from discovery.model.mesh import Mesh, VipSpec
from dnsgw.config import DnsConfig
from dnsgw.listen.tcp import TcpListener
from dnsgw.listen.udp import UdpListener
from dnsgw.mesh_zone.vip import claim, imported_names
from dnsgw.message.question import probe_question
from dnsgw.metrics import DnsMetrics
from dnsgw.resolver import RESOLVER_LIMITS, Resolver, ResolverLimits
from dnsgw.upstream.address import UpstreamAddress, UpstreamProtocol
from dnsgw.upstream.forwarder import TOTAL_S, Forwarder
from dnsgw.upstream.host_resolvers import DNS_PORT, Endpoint, leads_here, read_resolv_conf
from sniproxy.engine.network_changes import NetworkChanges

log = logging.getLogger(__name__)

_PORT_TRIES = 16  # to find a port that is free for both TCP and UDP


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTiming:
    """Intervals of a server's recurring work, in seconds, and the limits of its resolver."""

    probe_s: float = 300.0
    """Between two checks for forwarding loops. Rare, since a loop comes from a change of configuration."""

    probe_again_s: float = 10.0
    """The same, while there is a loop."""

    resolv_conf_s: float = 5.0
    """Between two checks whether resolv.conf has changed; each costs one stat."""

    retired_s: float = TOTAL_S + 0.2
    """How long replaced upstreams may still answer. All questions to them have ended by then."""

    resolver: ResolverLimits = RESOLVER_LIMITS
    """Times and limits of single questions."""


SERVER_TIMING = ServerTiming()
_OF_FORWARDER = ("upstream_ca", "race_s", "random_case", "client_subnet", "max_in_flight")


class UpstreamLoop(ValueError):
    """A configured upstream is this server itself, which would be an endless loop."""


class DnsServer:
    """Answers the clients of one network. `open`, then `run` until cancelled, then `close`."""

    def __init__(
        self,
        config: DnsConfig,
        *,
        registry: CollectorRegistry | None = None,
        claim: Callable[[str, VipSpec], None] | None = None,
        timing: ServerTiming = SERVER_TIMING,
        resolv_conf_port: int = DNS_PORT,
        udp_batches: bool = True,
    ) -> None:
        """Raises BadName for a bad domain.

        Args:
            config: what it answers, and whom it asks.
            registry: where its metrics are registered.
            claim: called with the id and content of a virtual address record, to create it if it does not exist.
            timing: intervals and limits.
            resolv_conf_port: port of the name servers in resolv.conf.
            udp_batches: read and write many UDP packets in one system call, where the kernel can.
        """
        self._timing = timing
        self._udp_batches = udp_batches
        self.started = asyncio.Event()
        """Set once `run` answers questions."""

        self._resolv_conf_port = resolv_conf_port
        self._claim = claim
        self.config = config
        self.addresses: tuple[Endpoint, ...] = ()
        """Where it listens, with the actual port in place of 0."""

        self.upstreams: tuple[UpstreamAddress, ...] = ()
        """The resolvers that are asked for all other names."""

        self.metrics = DnsMetrics()
        self._resolver = Resolver(config, self.metrics, timing.resolver)
        self._forwarders: list[Forwarder] = []
        """The last one is in use; those before it only wait for outstanding answers."""

        self._mesh: Mesh | None = None
        self._loop: asyncio.AbstractEventLoop
        self._udp: list[UdpListener] = []
        self._tcp: list[TcpListener] = []
        self._closing = asyncio.Event()
        self._resolv_conf: Fingerprint | None = None
        """The version of resolv.conf that was read last."""

        self._tasks: asyncio.TaskGroup | None = None
        self._working: set[asyncio.Task[None]] = set()
        self._probing: asyncio.Task[None] | None = None
        if registry is not None:
            registry.register(self.metrics)

    def reconfigure(self, config: DnsConfig) -> None:
        """Use another configuration. Network, domain, listening addresses and TCP limits stay as they are.

        Raises UpstreamLoop for an upstream that is this server, and OSError for certificates that cannot be read; then nothing
        has changed.
        """
        upstreams = self._choose_upstreams(config)
        elsewhere = upstreams != self.upstreams or config.forward != self.config.forward
        forwarder = None
        if elsewhere or any(getattr(config, name) != getattr(self.config, name) for name in _OF_FORWARDER):
            forwarder = self._make_forwarder(config, upstreams)
        self.config = config
        if forwarder is not None:
            self._ask_by(forwarder, upstreams)
        self._probe_anew()
        self._resolver.reconfigure(config, elsewhere=elsewhere)
        if self._mesh is not None:
            self._claim_addresses(self._mesh)

    def apply(self, mesh: Mesh) -> None:
        """Use this state of discovery. Until the first one, questions about our names wait, for at most 1 s."""
        self._mesh = mesh
        self._resolver.apply(mesh)
        self._claim_addresses(mesh)

    def _claim_addresses(self, mesh: Mesh) -> None:
        """Claim a virtual address for every imported service that has none, as long as the range has free ones."""
        if self._claim is None or self.config.vip is None:
            return
        for name in imported_names(mesh, self.config.imports):
            found = claim(name, mesh, self.config.network, self.config.vip)
            if found is not None:
                self._claim(*found)

    async def open(self) -> None:
        """Bind every address. Raises OSError, or UpstreamLoop for a configured upstream that is this server."""
        self._loop = asyncio.get_running_loop()
        with ExitStack() as undo:
            undo.callback(self._close_listeners)
            self.addresses = tuple(self._bind(endpoint) for endpoint in self.config.listen)
            upstreams = self._choose_upstreams(self.config)
            forwarder = self._make_forwarder(self.config, upstreams)
            undo.pop_all()
        self._ask_by(forwarder, upstreams)
        self.metrics.in_flight = lambda: sum(each.waiting for each in self._forwarders)
        self.metrics.tcp_connections = lambda: sum(map(len, self._tcp))
        self.metrics.upstreams = self.status

    def status(self) -> list[dict[str, object]]:
        """Return the state of each upstream, for the status page."""
        return [upstream.status() for upstream in self._forwarders[-1].upstreams] if self._forwarders else []

    def _make_forwarder(self, config: DnsConfig, upstreams: Sequence[UpstreamAddress]) -> Forwarder:
        """Raises OSError when the certificates of upstreams cannot be read."""
        secret = any(
            upstream.way in (UpstreamProtocol.TLS, UpstreamProtocol.HTTPS)
            for group in (upstreams, *config.forward.values())
            for upstream in group
        )
        return Forwarder(
            upstreams,
            self.metrics,
            zones=config.forward,
            max_in_flight=config.max_in_flight,
            race_s=config.race_s,
            tls=ssl.create_default_context(cadata=config.upstream_ca) if secret else None,
            random_case=config.random_case,
            client_subnet=config.client_subnet,
        )

    def _ask_by(self, forwarder: Forwarder, upstreams: tuple[UpstreamAddress, ...]) -> None:
        """Use these upstreams from now on. The former ones may still answer outstanding questions."""
        for former in self._forwarders:
            self._spawn(self._retire(former))
        self._forwarders.append(forwarder)
        self.upstreams = upstreams
        if self._tasks is not None:
            forwarder.attach(self._tasks.create_task)
        self._resolver.attach(self._loop, forwarder)

    async def _retire(self, forwarder: Forwarder) -> None:
        await asyncio.sleep(self._timing.retired_s)
        if forwarder in self._forwarders:
            self._forwarders.remove(forwarder)
            forwarder.close()
            await forwarder.ended()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Run this in a task of the server; None if the server does not run."""
        if self._tasks is None:
            work.close()
            return None
        task = self._tasks.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return task

    async def run(self) -> None:
        """Answer questions until cancelled or closed."""
        loop = asyncio.get_running_loop()
        for udp in self._udp:
            udp.start(loop)
        for tcp in self._tcp:
            await tcp.start(loop)
        log.info(
            "dns_listening",
            extra={
                "event": {
                    "addresses": [format_endpoint(*endpoint) for endpoint in self.addresses],
                    "upstreams": [str(upstream) for upstream in self.upstreams],
                    "domain": self.config.domain,
                    "network": self.config.network,
                }
            },
        )
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for forwarder in self._forwarders:
                    forwarder.attach(self._tasks.create_task)
                self._probe_anew()
                self._spawn(self._follow_resolv_conf())
                changes = NetworkChanges(self._network_changed)
                self.started.set()
                try:
                    await self._closing.wait()
                finally:
                    changes.close()
                    for forwarder in self._forwarders:
                        forwarder.attach(None)
                for task in self._working:
                    task.cancel()
        finally:
            self._tasks = None
            self._close_listeners()

    async def close(self) -> None:
        """Answer SERVFAIL to all outstanding questions, then close the sockets."""
        self._resolver.close()
        while self._forwarders:
            forwarder = self._forwarders.pop()
            forwarder.close()
            await forwarder.ended()
        self._close_listeners()
        self._closing.set()

    def _network_changed(self) -> None:
        for forwarder in self._forwarders:
            forwarder.renew()

    def _probe_anew(self) -> None:
        """Restart the check for forwarding loops, if it is configured."""
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None
        if self.config.loop_probe and self._forwarders:
            self._probing = self._spawn(self._probe(self._forwarders[-1]))

    async def _follow_resolv_conf(self) -> None:
        while True:
            await asyncio.sleep(self._timing.resolv_conf_s)
            self.check_resolv_conf()

    def check_resolv_conf(self) -> None:
        """If no upstreams are configured and resolv.conf has changed, use its name servers. Errors are logged."""
        if self.config.upstream or fingerprint(self.config.resolv_conf) == self._resolv_conf:
            return
        try:
            upstreams = self._choose_upstreams(self.config)
            if upstreams and upstreams != self.upstreams:  # an empty file is being written
                self.reconfigure(self.config)
        except (OSError, UpstreamLoop) as error:
            log.error("dns_upstreams_refused", extra={"event": {"detail": str(error)}})
        else:
            log.info("dns_upstreams", extra={"event": {"upstreams": [str(each) for each in self.upstreams]}})

    async def _probe(self, forwarder: Forwarder) -> None:
        """Periodically ask each upstream for a random name. If the question comes back here, there is a forwarding loop.

        Such an upstream is asked nothing else until the loop is gone.
        """
        while True:
            for upstream in forwarder.upstreams:
                seen = asyncio.Event()
                answered = asyncio.Event()
                query = probe_question()
                forget = self._resolver.expect_probe(query.name, seen.set)
                try:
                    forwarder.ask(query, lambda _, answered=answered: answered.set(), tcp=False, only=upstream)  # type: ignore[misc]
                    await answered.wait()
                finally:
                    forget()
                if seen.is_set() and not upstream.looping:
                    log.error("dns_loop", extra={"event": {"upstream": str(upstream.destination)}})
                upstream.looping = seen.is_set()
            looping = any(upstream.looping for upstream in forwarder.upstreams)
            await asyncio.sleep(self._timing.probe_again_s if looping else self._timing.probe_s)

    def _close_listeners(self) -> None:
        for udp in self._udp:
            udp.close()
        for tcp in self._tcp:
            tcp.close()
        self._udp.clear()
        self._tcp.clear()

    def _bind(self, endpoint: Endpoint) -> Endpoint:
        """Listen on UDP and TCP. Raises OSError with the address in its text."""
        address, port = endpoint
        for tries_left in reversed(range(_PORT_TRIES)):
            try:
                return self._bind_both(address, port)
            except OSError as error:
                if port or not tries_left:
                    what = f"cannot listen on {format_endpoint(address, port)}: {error.strerror}"
                    if error.errno == errno.EACCES:
                        what += " (a port that low takes root or CAP_NET_BIND_SERVICE)"
                    raise OSError(error.errno, what) from error
        raise AssertionError("the last attempt returns or raises")

    def _bind_both(self, address: Address, port: int) -> Endpoint:
        tcp = TcpListener(
            (address, port),
            self._resolver,
            max_connections=self.config.max_tcp_connections,
            max_connections_per_client=self.config.max_tcp_connections_per_client,
            idle_timeout_s=self.config.tcp_idle_timeout_s,
            reuse_port=self.config.reuse_port,
        )
        try:
            udp = UdpListener(
                (address, tcp.port),
                self._resolver,
                self.metrics,
                reuse_port=self.config.reuse_port,
                batches=self._udp_batches,
            )
        except OSError:
            tcp.close()
            raise
        self._tcp.append(tcp)
        self._udp.append(udp)
        return address, tcp.port

    def _choose_upstreams(self, config: DnsConfig) -> tuple[UpstreamAddress, ...]:
        """Return the configured upstreams, or those of resolv.conf without this server, which the host may well use.

        Raises UpstreamLoop.
        """
        chosen = tuple(_destination(upstream) for upstream in config.upstream)
        for upstream in (*chosen, *(upstream for group in config.forward.values() for upstream in group)):
            if leads_here(upstream.endpoint, self.addresses):
                raise UpstreamLoop(
                    f"upstream {format_endpoint(*upstream.endpoint)} is this server itself: name another resolver"
                )
        if chosen:
            return chosen
        self._resolv_conf = fingerprint(config.resolv_conf)
        found = read_resolv_conf(config.resolv_conf, self._resolv_conf_port)
        kept = tuple(UpstreamAddress(*endpoint) for endpoint in found if not leads_here(endpoint, self.addresses))
        if not kept:
            log.warning(
                "dns_no_upstream",
                extra={"event": {"resolv_conf": str(config.resolv_conf), "name_servers": len(found)}},
            )
        return kept


def _destination(upstream: UpstreamAddress | Endpoint) -> UpstreamAddress:
    return upstream if isinstance(upstream, UpstreamAddress) else UpstreamAddress(*upstream)
