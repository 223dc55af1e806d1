"""The embedded TURN server: listeners for clients, and what their sessions share."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from sniproxy.engine import Listener, Wire
from turnreg.auth import Authenticator
from turnreg.server.admission import Strangers
from turnreg.server.allocation import AllocationTable, Endpoint
from turnreg.server.config import TurnServerConfig
from turnreg.server.metrics import TurnMetrics
from turnreg.server.ports import PortRange
from turnreg.server.relayed import Meeting
from turnreg.server.session import ClientSession, RelayPorts
from turnreg.server.transaction import Transactions


class TurnServer:
    """TCP allocations over TCP (RFC 8489, RFC 8656, RFC 6062). `open` it, then `run` it, or use `serving`."""

    def __init__(self, config: TurnServerConfig, listeners: list[Listener], registry: CollectorRegistry) -> None:
        """Take listeners that are open; `open` makes them."""
        self.config = config
        self._listeners = listeners
        self._strangers: Strangers[Wire] = Strangers(config.max_unauthenticated)
        table = AllocationTable(config.limits, secrets.token_bytes)
        relays = [
            RelayPorts(address, PortRange(config.port_min, config.port_max, secrets.randbelow))
            for address in config.relay_addresses
        ]
        self._relays = {relay.family: relay for relay in relays}
        transactions = Transactions(
            authenticator=Authenticator(
                realm=config.realm,
                nonce_secret=secrets.token_bytes(32),
                users=config.users,
                secrets=config.secrets,
                nonce_lifetime_s=config.nonce_lifetime_s,
            ),
            table=table,
            families=self._relays,
            allowed_peers=config.allowed_peers,
            software=config.software,
            draw=secrets.token_bytes,
        )
        metrics = TurnMetrics(
            registry,
            allocations=lambda: len(table),
            unauthenticated=lambda: len(self._strangers),
            unbound=lambda: table.waiting,
        )
        self._meeting = Meeting(table, transactions, metrics)

    @classmethod
    async def open(cls, config: TurnServerConfig, *, registry: CollectorRegistry | None = None) -> "TurnServer":
        """Open the listeners. Raises OSError, which names the address, if one cannot be had or relayed from."""
        listeners: list[Listener] = []
        try:
            for relay_address in config.relay_addresses:  # better now than by a 508 to every client
                (await Listener.open(relay_address, 0)).close()
            for address, port in config.listen:
                listeners.append(await Listener.open(address, port))
        except OSError:
            for listener in listeners:
                listener.close()
            raise
        return cls(config, listeners, registry or CollectorRegistry())

    @property
    def addresses(self) -> tuple[Endpoint, ...]:
        """Where it listens, in the order of the configuration, with the ports that were chosen for 0."""
        return tuple(listener.address for listener in self._listeners)

    @property
    def allocations(self) -> int:
        """Allocations now."""
        return len(self._meeting.table)

    async def run(self) -> None:
        """Serve until cancelled, which cuts every stream and closes every port."""
        try:
            async with asyncio.TaskGroup() as group:
                for listener in self._listeners:
                    group.create_task(listener.serve(self._client))
        finally:
            for listener in self._listeners:
                listener.close()

    @classmethod
    @asynccontextmanager
    async def serving(
        cls, config: TurnServerConfig, *, registry: CollectorRegistry | None = None
    ) -> AsyncIterator["TurnServer"]:
        """Open the server and run it while the block runs."""
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

    async def _client(self, wire: Wire) -> None:
        """Serve one client. TLS would be put round the wire here: a session does not know the difference."""
        if wire.peer[0]:  # else reset between its connect and our accept
            session = ClientSession(
                wire,
                config=self.config,
                meeting=self._meeting,
                relays=self._relays,
                strangers=self._strangers,
            )
            await session.run()
