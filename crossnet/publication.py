"""What a process says of itself in discovery: its network, relay, TURN servers and directly reachable gateway."""

import asyncio
import logging

from crossnet.sections import Config
from crossnet.sources import learn_source
from discovery.contract import Discovery
from discovery.model import Kind, Mesh, Record
from discovery.spec import RelaySpec, TurnSpec

log = logging.getLogger(__name__)

ASK_AGAIN_S = 30.0
"""A relay's address as a TURN server sees it changes when somebody changes the network, not by the minute."""

ASK_AGAIN_FIRST_S = 1.0
"""After a TURN server's record came or changed: the server itself may be starting."""


def publish_turn_servers(config: Config, discovery: Discovery, instead_of: Config | None = None) -> None:
    """Say which TURN servers of ours somebody else runs, and no longer what another configuration said."""
    gone = {section.id for section in instead_of.turn_servers} if instead_of is not None else set()
    for id_ in gone - {section.id for section in config.turn_servers}:
        discovery.withdraw(Kind.TURN, id_)
    for section in config.turn_servers:
        spec = TurnSpec(
            url=section.url,
            relay_addresses=[str(address) for address in section.relay_addresses],
            port_min=section.port_min,
            port_max=section.port_max,
            zone=section.zone or "",
        )
        discovery.publish(Kind.TURN, section.id, spec)


class RelayPublication:
    """Keeps our relay's record true: where clients reach it, and which address each TURN server sees it come from."""

    def __init__(self, config: Config, discovery: Discovery, ports: list[int], addresses: list[str]) -> None:
        assert config.relay is not None
        self._network = config.network
        self._section = config.relay
        self._discovery = discovery
        self._addresses, self._ports = addresses, ports
        self._sources: dict[str, list[str]] = {
            turn: [str(address) for address in given] for turn, given in config.relay.sources.items()
        }
        self._changed = asyncio.Event()
        self._withdrawn = False
        self.reconfigure(config)

    async def run(self) -> None:
        """Publish, and publish again when a TURN server of our network comes, goes or sees us otherwise."""
        unsubscribe = self._discovery.subscribe(self._notice)
        known: dict[str, Record[TurnSpec]] = {}
        pause, due = ASK_AGAIN_FIRST_S, False
        self._publish()
        try:
            while True:
                self._changed.clear()
                turns = {
                    record.id: record
                    for record in self._discovery.mesh.turns(self._network)
                    if record.id not in self._section.sources
                }
                for gone in self._sources.keys() - turns.keys() - self._section.sources.keys():
                    del self._sources[gone]
                news = [record for turn, record in turns.items() if known.get(turn) != record]
                async with asyncio.TaskGroup() as group:
                    for record in turns.values() if due else news:
                        group.create_task(self._ask(record))
                known = turns
                self._publish()
                if news:
                    pause = ASK_AGAIN_FIRST_S
                due = not await self._changes_within(pause)
                if due:
                    pause = min(pause * 2, ASK_AGAIN_S)
        finally:
            unsubscribe()

    def set_ports(self, ports: list[int]) -> None:
        """Say that clients reach us on these ports."""
        self._ports = ports
        self._changed.set()

    def reconfigure(self, config: Config) -> None:
        """Ask for the networks that this configuration imports from."""
        assert config.relay is not None
        imported = {network for section in config.imports for network in section.sources}
        self._asks = sorted((imported | set(config.relay.asks)) - {config.network})
        self._changed.set()

    def withdraw(self) -> None:
        """Send no more clients here."""
        self._withdrawn = True
        self._discovery.withdraw(Kind.RELAY, self._section.id)

    async def _changes_within(self, pause_s: float) -> bool:
        try:
            async with asyncio.timeout(pause_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _notice(self, mesh: Mesh) -> None:
        del mesh
        self._changed.set()

    async def _ask(self, turn: Record[TurnSpec]) -> None:
        source = await learn_source(turn)
        if source is None:
            log.warning("relay_source_unknown", extra={"event": {"turn": turn.id, "url": turn.spec.url}})
            return
        if self._sources.get(turn.id) != [source]:
            self._sources[turn.id] = [source]
            log.info("relay_source", extra={"event": {"turn": turn.id, "source": source}})

    def _publish(self) -> None:
        if not self._withdrawn:
            spec = RelaySpec(addresses=self._addresses, ports=self._ports, sources=dict(self._sources), asks=self._asks)
            self._discovery.publish(Kind.RELAY, self._section.id, spec)
