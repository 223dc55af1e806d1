"""Publishes a relay's own record, and the records of external TURN servers, in discovery."""

import asyncio
import logging
from enum import StrEnum
from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from crossnet.app.reflexive_address import Source, learn_source
from crossnet.config.sections import Config
from discovery.client.contract import Discovery
from discovery.model.mesh import Kind, Mesh, Record
from discovery.model.spec import RelaySpec, TurnSpec

log = logging.getLogger(__name__)

ASK_AGAIN_S = 30.0
"""Longest pause. A relay's address as a TURN server sees it changes when somebody changes the network, not by the minute."""

ASK_AGAIN_FIRST_S = 1.0
"""First pause after a TURN server's record has appeared or changed: the server itself may be starting."""


def publish_turn_servers(config: Config, discovery: Discovery, instead_of: Config | None = None) -> None:
    """Publish the records of external TURN servers, and withdraw those that only a former configuration had."""
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


class SourceState(StrEnum):
    """How we know our address as a TURN server sees it. Metric label."""

    ASKED = "asked"
    """The server reports it."""
    KEPT = "kept"
    """The server reported it before, and does not answer now."""
    ASSUMED = "assumed"
    """The server has never answered; it is our local address for the route to it."""
    UNKNOWN = "unknown"
    """There is no route to the server."""
    CONFIGURED = "configured"
    """It is set in `relay.sources`."""


class RelayPublication:
    """Maintains our relay's record: where clients reach it, and from which address each TURN server sees it connect."""

    def __init__(
        self,
        config: Config,
        discovery: Discovery,
        ports: list[int],
        addresses: list[str],
        registry: CollectorRegistry | None = None,
        *,
        ask_again_first_s: float = ASK_AGAIN_FIRST_S,
    ) -> None:
        """Publish nothing before `run`.

        Args:
            config: network, relay and imports.
            discovery: takes the record.
            ports: ports on which clients reach the relay.
            addresses: addresses under which they reach it.
            registry: where the metric is registered.
            ask_again_first_s: first pause until TURN servers are asked again; it doubles each time.
        """
        assert config.relay is not None
        self._ask_again_first_s = ask_again_first_s
        self._learned: dict[str, Source] = {}
        self._asked_of: dict[str, TurnSpec] = {}  # the record for which a server has answered
        sources = Gauge(
            "crossnet_relay_sources",
            "TURN servers of this network, by how this relay knows the address that they see it come from.",
            ["state"],
            registry=registry or CollectorRegistry(),
        )
        for state in SourceState:
            sources.labels(state.value).set_function(partial(self._count, state))
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
        """Publish the record, and update it when TURN servers of our network or our addresses there change."""
        unsubscribe = self._discovery.subscribe(self._notice)
        known: dict[str, Record[TurnSpec]] = {}
        pause, due = self._ask_again_first_s, False
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
                for known_as in (self._learned, self._asked_of):
                    for gone in known_as.keys() - turns.keys():
                        del known_as[gone]
                news = [record for turn, record in turns.items() if known.get(turn) != record]
                async with asyncio.TaskGroup() as group:
                    for record in turns.values() if due else news:
                        group.create_task(self._ask(record))
                known = turns
                self._publish()
                if news:
                    pause = self._ask_again_first_s
                due = not await self._changes_within(pause)
                if due:
                    pause = min(pause * 2, ASK_AGAIN_S)
        finally:
            unsubscribe()

    def set_ports(self, ports: list[int]) -> None:
        """Publish other ports."""
        self._ports = ports
        self._changed.set()

    def reconfigure(self, config: Config) -> None:
        """Publish which networks this configuration wants to reach."""
        assert config.relay is not None
        imported = {network for section in config.imports for network in section.sources}
        self._asks = sorted((imported | set(config.relay.asks)) - {config.network})
        self._changed.set()

    def withdraw(self) -> None:
        """Withdraw the record for good."""
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
        before, self._learned[turn.id] = self._learned.get(turn.id), source
        known = self._sources.get(turn.id)
        if source.asked:
            self._asked_of[turn.id] = turn.spec
        elif self._asked_of.get(turn.id) != turn.spec:
            self._asked_of.pop(turn.id, None)  # a server's last answer is valid as long as its record is the same
        if source.address is not None and (source.asked or turn.id not in self._asked_of):
            self._sources[turn.id] = [source.address]
        state = self._state(turn.id)
        event = {"turn": turn.id, "url": turn.spec.url, "source": next(iter(self._sources.get(turn.id, ())), None)}
        if source.asked:
            if self._sources[turn.id] != known or (before is not None and not before.asked):
                log.info("relay_source", extra={"event": event})
        elif before is None or before.asked or before.address != source.address:
            # Logged once, when it begins: from now on a gateway's permission may be for the wrong address.
            log.warning("relay_source_not_asked", extra={"event": event | {"state": state, "detail": source.detail}})

    def _state(self, turn: str) -> SourceState:
        source = self._learned[turn]
        if source.asked:
            return SourceState.ASKED
        if turn in self._asked_of:
            return SourceState.KEPT
        return SourceState.UNKNOWN if source.address is None else SourceState.ASSUMED

    def _count(self, state: SourceState) -> int:
        return sum(line["state"] is state for line in self.sources())

    def sources(self) -> list[dict[str, object]]:
        """Return for each TURN server our address as it sees it, and how we know, for the status page."""
        lines: list[dict[str, object]] = []
        for turn in sorted(self._sources.keys() | self._learned.keys()):
            learned = self._learned.get(turn)
            lines.append(
                {
                    "turn": turn,
                    "addresses": self._sources.get(turn, []),
                    "state": SourceState.CONFIGURED if learned is None else self._state(turn),
                    "detail": "" if learned is None else learned.detail,
                }
            )
        return lines

    def _publish(self) -> None:
        if not self._withdrawn:
            spec = RelaySpec(addresses=self._addresses, ports=self._ports, sources=dict(self._sources), asks=self._asks)
            self._discovery.publish(Kind.RELAY, self._section.id, spec)
