"""The resolver of a network as a server: its sockets, and the one place where its parts meet."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import IPv4Network, IPv6Network

from prometheus_client import CollectorRegistry

from discovery.addresses import Address, format_endpoint
from discovery.imports import Imports
from discovery.model import Mesh, VipSpec
from dnsgw.config import DnsConfig
from dnsgw.destination import Destination, Way
from dnsgw.forward import Forwarder
from dnsgw.metrics import DnsMetrics
from dnsgw.resolver import Resolver
from dnsgw.tcp import TcpListener
from dnsgw.udp import UdpListener
from dnsgw.upstream import Endpoint, leads_here, read_resolv_conf
from dnsgw.vip import claim, imported_names
from dnsgw.wire import probe_question

log = logging.getLogger(__name__)

PROBE_S = 300.0  # a loop is made by somebody's change of configuration, which is rare
PROBE_AGAIN_S = 10.0
_PORT_TRIES = 16  # to find a port that is free for TCP and UDP alike


class UpstreamLoop(ValueError):
    """An upstream that is this server itself: it would ask itself for ever."""


class DnsServer:
    """Answers the clients of one network. `open`, then `run` until cancelled, then `close`."""

    def __init__(
        self,
        config: DnsConfig,
        *,
        registry: CollectorRegistry | None = None,
        claim: Callable[[str, VipSpec], None] | None = None,
    ) -> None:
        """Prepare. `claim` creates the record of an address, by its id, if it is absent. Raises BadName for a bad domain."""
        self._claim = claim
        self.config = config
        self.addresses: tuple[Endpoint, ...] = ()
        """Where it listens, with the ports that were chosen for 0."""

        self.upstreams: tuple[Destination, ...] = ()
        """Who is asked for everything else."""

        self.metrics = DnsMetrics()
        self._resolver = Resolver(config, self.metrics)
        self._forwarder: Forwarder | None = None
        self._udp: list[UdpListener] = []
        self._tcp: list[TcpListener] = []
        self._closing = asyncio.Event()
        self._closers: list[Callable[[], object]] = []
        if registry is not None:
            registry.register(self.metrics)

    def reimport(self, imports: Imports) -> None:
        """Import these names from the next `apply` on."""
        self._resolver.reimport(imports)

    def apply(self, mesh: Mesh) -> None:
        """Answer from this state of discovery from now on. Until the first one, questions of ours are held, 1 s at most."""
        self._resolver.apply(mesh)
        if self._claim is not None and self.config.vip is not None:
            self._claim_addresses(mesh, self.config.vip, self._claim)

    def _claim_addresses(
        self, mesh: Mesh, vips: IPv4Network | IPv6Network, create: Callable[[str, VipSpec], None]
    ) -> None:
        """See to it that every imported service has an address of its own, as far as the range goes."""
        for name in imported_names(mesh, self.config.imports):
            found = claim(name, mesh, self.config.network, vips)
            if found is not None:
                create(*found)

    async def open(self) -> None:
        """Bind every address. Raises OSError, or UpstreamLoop for a configured upstream that is this server."""
        with ExitStack() as undo:
            undo.callback(self._close_listeners)
            self.addresses = tuple(self._bind(endpoint) for endpoint in self.config.listen)
            self.upstreams = self._choose_upstreams()
            undo.pop_all()
        config = self.config
        secret = any(
            upstream.way in (Way.TLS, Way.HTTPS)
            for group in (self.upstreams, *config.forward.values())
            for upstream in group
        )
        forwarder = Forwarder(
            self.upstreams,
            self.metrics,
            zones=config.forward,
            max_in_flight=config.max_in_flight,
            race_s=config.race_s,
            tls=ssl.create_default_context(cafile=config.upstream_ca) if secret else None,
            random_case=config.random_case,
        )
        self._forwarder = forwarder
        self.metrics.in_flight = lambda: forwarder.waiting
        self.metrics.tcp_connections = lambda: sum(map(len, self._tcp))
        self._resolver.attach(asyncio.get_running_loop(), forwarder)

    async def run(self) -> None:
        """Answer until cancelled or closed."""
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
        forwarder = self._forwarder
        try:
            async with asyncio.TaskGroup() as tasks:
                if forwarder is not None:
                    forwarder.attach(tasks.create_task)
                    if self.config.loop_probe:
                        probing = tasks.create_task(self._probe(forwarder))
                        self._closers.append(probing.cancel)
                await self._closing.wait()
                while self._closers:
                    self._closers.pop()()
        finally:
            if forwarder is not None:
                forwarder.attach(None)
            self._close_listeners()

    async def close(self) -> None:
        """Stop: what is held or in flight is answered SERVFAIL over the sockets that still are."""
        self._resolver.close()
        if self._forwarder is not None:
            self._forwarder.close()
            await self._forwarder.ended()
        self._close_listeners()
        self._closing.set()

    async def _probe(self, forwarder: Forwarder) -> None:
        """Ask each upstream a name that nobody has, again and again: what comes back here goes round in a circle.

        Such an upstream is asked nothing else until that has ended.
        """
        while True:
            for upstream in forwarder.upstreams:
                seen = asyncio.Event()
                answered = asyncio.Event()
                query, message = probe_question()
                forget = self._resolver.expect_probe(query.name, seen.set)
                forwarder.ask(message, query, lambda _, answered=answered: answered.set(), tcp=False, only=upstream)  # type: ignore[misc]
                await answered.wait()
                forget()
                if seen.is_set() and not upstream.looping:
                    log.error("dns_loop", extra={"event": {"upstream": str(upstream.destination)}})
                upstream.looping = seen.is_set()
            looping = any(upstream.looping for upstream in forwarder.upstreams)
            await asyncio.sleep(PROBE_AGAIN_S if looping else PROBE_S)

    def _close_listeners(self) -> None:
        for udp in self._udp:
            udp.close()
        for tcp in self._tcp:
            tcp.close()
        self._udp.clear()
        self._tcp.clear()

    def _bind(self, endpoint: Endpoint) -> Endpoint:
        """Listen over both. Raises OSError, which names the address."""
        address, port = endpoint
        for tries_left in reversed(range(_PORT_TRIES)):
            try:
                return self._bind_both(address, port)
            except OSError as error:
                if port or not tries_left:
                    what = f"cannot listen on {format_endpoint(address, port)}: {error.strerror}"
                    raise OSError(error.errno, what) from error
        raise AssertionError("the last try raises")

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
            udp = UdpListener((address, tcp.port), self._resolver, self.metrics, reuse_port=self.config.reuse_port)
        except OSError:
            tcp.close()
            raise
        self._tcp.append(tcp)
        self._udp.append(udp)
        return address, tcp.port

    def _choose_upstreams(self) -> tuple[Destination, ...]:
        """Take the configured upstreams; or the host's, but for ourselves, whom the host may well ask."""
        config = self.config
        chosen = tuple(_destination(upstream) for upstream in config.upstream)
        for upstream in (*chosen, *(upstream for group in config.forward.values() for upstream in group)):
            if leads_here(upstream.endpoint, self.addresses):
                raise UpstreamLoop(
                    f"upstream {format_endpoint(*upstream.endpoint)} is this server itself: name another resolver"
                )
        if chosen:
            return chosen
        found = read_resolv_conf(config.resolv_conf)
        kept = tuple(Destination(*endpoint) for endpoint in found if not leads_here(endpoint, self.addresses))
        if not kept:
            log.warning(
                "dns_no_upstream",
                extra={"event": {"resolv_conf": str(config.resolv_conf), "name_servers": len(found)}},
            )
        return kept


def _destination(upstream: Destination | Endpoint) -> Destination:
    return upstream if isinstance(upstream, Destination) else Destination(*upstream)
