"""The embedded TURN server: listeners for clients, and the state that their sessions share."""

import asyncio
import logging
import resource
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

from prometheus_client import CollectorRegistry

from sniproxy.engine import Listener, SocketStream, TlsStream
from sniproxy.engine.host_addresses import is_own_address
from turnreg.server.allocation import AllocationTable, Endpoint, Refusal
from turnreg.server.certificates import Certificates
from turnreg.server.config import TurnServerConfig
from turnreg.server.datagram_clients import DatagramClients
from turnreg.server.datagrams import DatagramSocket
from turnreg.server.live_allocation import ServerState
from turnreg.server.metrics import TurnMetrics
from turnreg.server.pace import AnswerRate
from turnreg.server.relay_ports import RelayPorts
from turnreg.server.session import ClientSession
from turnreg.server.transaction import Transactions
from turnreg.server.unauthenticated import UnauthenticatedConnections
from turnreg.stun.auth import Authenticator, client_key

log = logging.getLogger(__name__)

MIN_OPEN_FILES = 16_384
"""A lower limit is logged at the start. This one is enough for about eight thousand streams, less the listening ports."""


@dataclass(slots=True)
class Listening:
    """The open sockets of a server."""

    tcp: list[Listener] = field(default_factory=list)
    tls: list[Listener] = field(default_factory=list)
    udp: list[DatagramSocket] = field(default_factory=list)

    def close(self) -> None:
        """Close all of them."""
        for listener in (*self.tcp, *self.tls):
            listener.close()
        for sock in self.udp:
            sock.close()


class TurnServer:
    """STUN and TURN over TCP, TLS and UDP (RFC 8489, RFC 8656, RFC 6062). `open` it, then `run` it, or use `serving`."""

    def __init__(
        self,
        config: TurnServerConfig,
        listening: Listening,
        certificates: Certificates | None,
        registry: CollectorRegistry,
    ) -> None:
        """Make a server from open listeners. Use `open` instead."""
        self.config = config
        self._listening = listening
        self._certificates = certificates
        self._unauthenticated: UnauthenticatedConnections[SocketStream] = UnauthenticatedConnections(
            config.max_unauthenticated
        )
        table = AllocationTable(config.limits, secrets.token_bytes)
        relays = [
            RelayPorts(address, config.port_min, config.port_max, shared=config.active_connect)
            for address in config.relay_addresses
        ]
        by_family = {relay.family: relay for relay in relays}
        self._authenticator = Authenticator(
            realm=config.realm,
            nonce_secret=secrets.token_bytes(32),
            users=config.users,
            secrets=config.secrets,
            nonce_lifetime_s=config.nonce_lifetime_s,
        )
        transactions = Transactions(
            authenticator=self._authenticator,
            table=table,
            families=by_family,
            allowed_peers=config.allowed_peers,
            software=config.software,
            draw=secrets.token_bytes,
            udp_allocations=config.udp_allocations,
            active_connect=config.active_connect,
            advertised=config.advertised,
            is_ours=self._is_ours,
        )
        metrics = TurnMetrics(
            registry,
            allocations=lambda: len(table),
            largest_account=lambda: table.largest_account,
            unauthenticated=lambda: len(self._unauthenticated),
            unbound=lambda: table.waiting,
        )
        self._state = ServerState(table, transactions, metrics, by_family)
        rate = AnswerRate(secrets.token_bytes(32))
        self._datagram_clients = [DatagramClients(sock, self._state, rate) for sock in listening.udp]

    @classmethod
    async def open(cls, config: TurnServerConfig, *, registry: CollectorRegistry | None = None) -> "TurnServer":
        """Open the listeners. Raises OSError, which names the address, if an address cannot be used for listening or relaying."""
        listening = Listening()
        certificates = None
        try:
            for relay_address in config.relay_addresses:  # fail now rather than with a 508 for every client
                (await Listener.open(relay_address, 0)).close()
            for address, port in config.listen:
                listening.tcp.append(await Listener.open(address, port))
            for address, port in config.listen_udp:
                listening.udp.append(DatagramSocket.open(address, port))
            if config.listen_tls and config.tls_cert and config.tls_key:
                certificates = Certificates(config.tls_cert, config.tls_key, poll_interval_s=config.certificate_poll_s)
                for address, port in config.listen_tls:
                    listening.tls.append(await Listener.open(address, port, tls=certificates.context))
        except OSError:
            listening.close()
            raise
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files < MIN_OPEN_FILES:
            log.warning("turn: %d open files are allowed, and a stream takes two: raise the limit (LimitNOFILE)", files)
        return cls(config, listening, certificates, registry or CollectorRegistry())

    def reconfigure(self, config: TurnServerConfig) -> None:
        """Use these users, secrets, allowed peers and limits from now on.

        Existing allocations, permissions and streams stay. A removed user can no longer refresh an allocation, which then ends with
        its lifetime.
        """
        self.config = config
        self._authenticator.know(config.users, config.secrets)
        self._state.table.limits = config.limits
        self._state.transactions.reconfigure(config.allowed_peers, asyncio.get_running_loop().time())

    @property
    def addresses(self) -> tuple[Endpoint, ...]:
        """Where it listens for TCP, in the order of the configuration, with the actual ports where 0 was configured."""
        return tuple(listener.address for listener in self._listening.tcp)

    @property
    def tls_addresses(self) -> tuple[Endpoint, ...]:
        """The same for TLS."""
        return tuple(listener.address for listener in self._listening.tls)

    @property
    def udp_addresses(self) -> tuple[Endpoint, ...]:
        """The same for UDP."""
        return tuple(sock.address for sock in self._listening.udp)

    @property
    def allocations(self) -> int:
        """Number of allocations."""
        return len(self._state.table)

    @property
    def streams(self) -> int:
        """Number of streams, including peers that wait for their bind."""
        return self._state.metrics.streams + self._state.table.waiting

    async def run(self) -> None:
        """Serve until cancelled. Cancelling resets every stream and closes every port."""
        try:
            async with asyncio.TaskGroup() as group:
                for listener in self._listening.tcp:
                    group.create_task(listener.serve(self._client))
                for listener in self._listening.tls:
                    group.create_task(listener.serve(self._client))
                if self._certificates is not None:
                    group.create_task(self._certificates.renew(self._listening.tls))
                for clients in self._datagram_clients:
                    group.create_task(clients.serve())
        finally:
            self._listening.close()
            for relay in self._state.relays.values():
                relay.close()

    def drain(self) -> None:
        """Answer each new Allocate with 508. Existing allocations and their streams keep working until `run` is cancelled."""
        self._state.table.draining = True

    @classmethod
    @asynccontextmanager
    async def serving(
        cls, config: TurnServerConfig, *, registry: CollectorRegistry | None = None
    ) -> AsyncIterator["TurnServer"]:
        """Open a server, and run it while the block runs."""
        server = await cls.open(config, registry=registry)
        failure: BaseException | None = None
        async with asyncio.TaskGroup() as group:
            running = group.create_task(server.run())
            try:
                yield server
            except Exception as exc:  # noqa: BLE001 - raised below, not wrapped in a group
                failure = exc
            running.cancel()
        if failure is not None:
            raise failure

    async def _client(self, stream: SocketStream) -> None:
        """Serve one client. During a TLS handshake it counts as unauthenticated."""
        if not stream.peer[0]:
            return  # reset between its connect and our accept
        if isinstance(stream, TlsStream):
            self._admit(stream)
            try:
                await stream.handshake(self.config.unauthenticated_timeout_s)
            except (OSError, TimeoutError):
                self._state.metrics.refused(Refusal.TLS_FAILED)
                return
            finally:
                self._unauthenticated.dismiss(stream)
        self._admit(stream)
        session = ClientSession(stream, config=self.config, state=self._state, unauthenticated=self._unauthenticated)
        await session.run()

    def _admit(self, stream: SocketStream) -> None:
        crowded_out = self._unauthenticated.admit(stream, client_key(stream.peer[0]))
        if crowded_out is not None:
            self._state.metrics.refused(Refusal.CROWDED_OUT)
            crowded_out.reset()

    def _is_ours(self, address: str) -> bool:
        return address in self.config.advertised.values() or is_own_address(ip_address(address))
