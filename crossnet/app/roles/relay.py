"""The relay as a role: the relay itself, its record, and the ports that it opens for services."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import ClassVar, TypeVar

from crossnet.app import role_configs
from crossnet.app.auto_ports import AdaptivePorts
from crossnet.app.publication import RelayPublication
from crossnet.app.role import FORGET_S, Role
from crossnet.config.sections import Config, RelaySection
from crossnet.handover import Place
from dnsgw.config import DEFAULT_TTL_S
from sniproxy.relay.relay import Relay
from sniproxy.tunnel.keys import SigningKeys

T = TypeVar("T")

ADAPTED = "relay's services"
"""Role name, in a handover, of sockets that a relay has opened for the ports of services."""


class RelayRole(Role):
    """Accepts the connections of this network's clients."""

    name: ClassVar[str] = "relay"
    relay: Relay
    publication: RelayPublication
    _running: asyncio.Task[None]
    _publishing: tuple[asyncio.Task[None], ...] = ()
    _longer_ttl_until = 0.0
    """Until when DNS answers from before the TTL was lowered are valid, in the loop's time."""

    async def open(self) -> None:
        """Bind, serve and publish."""
        host, section = self.host, _section(self.host.config)
        config = role_configs.relay_config(host.config, section, host.guard())
        self.relay = relay = Relay(
            config, host.discovery, SigningKeys(role_configs.keys(host.config)), registry=host.registry
        )
        self.ledger = relay.ledger
        await self.begin(relay.open(partial(host.inherited.take, self.name)))
        if section.ports == "auto":
            for sock in host.inherited.rest(ADAPTED):
                relay.adopt(sock)
        self.listens(relay.addresses)
        self._running = host.run(self.name, relay.run())
        addresses = [str(address) for address in section.advertise] or _unique(
            address for address, _ in relay.addresses
        )
        ports = _unique(port for _, port in relay.addresses)
        self.publication = RelayPublication(host.config, host.discovery, ports, addresses, host.registry)
        self._publishing = (host.run("publication", self.publication.run()),)
        if section.ports == "auto":
            adaptive = AdaptivePorts(
                relay, host.discovery, section.port_range, self.publication.set_ports, own=section.own_ports
            )
            self._publishing += (host.run("ports", adaptive.run()),)

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield the change of live settings, such as rules, keys and limits, and then of the record."""
        relay = role_configs.relay_config(new, _section(new), self.relay.config.guard)
        yield partial(self.relay.reconfigure, relay, SigningKeys(role_configs.keys(new)))
        yield partial(self.publication.reconfigure, new)
        yield partial(self.note_ttl, old, new)

    def note_ttl(self, old: Config, new: Config) -> None:
        """If the TTL is lowered, remember until when former answers are valid."""
        if _ttl_s(new) < _ttl_s(old):
            lives_until = asyncio.get_running_loop().time() + _ttl_s(old)
            self._longer_ttl_until = max(self._longer_ttl_until, lives_until)

    def sockets(self) -> Iterator[tuple[Place, int]]:
        """Yield the configured listeners, then those for services."""
        for place, number in self.relay.listening():
            yield (self.name, *place), number
        for place, number in self.relay.adapted():
            yield (ADAPTED, *place), number

    def withdraw(self) -> None:
        """Withdraw the record."""
        self.publication.withdraw()

    def hand_over(self) -> None:
        """Stop writing the record, which might replace our successor's."""
        for task in self._publishing:
            task.cancel()

    def comes_until(self, now: float) -> float:
        """Return until when clients' resolvers may have an answer with our address."""
        named = self.host.config.static_mesh is None or self.host.has("dns")
        if self.host.handed_over or not named:  # clients reach our successor through the same sockets
            return now
        return self.named_until(now)

    def named_until(self, now: float) -> float:
        """Return until when resolvers may return answers from before `now`."""
        return max(now + _ttl_s(self.host.config), self._longer_ttl_until) + FORGET_S

    def stop_listening(self) -> None:
        """Close the listeners."""
        self.relay.close()

    stop_accepting = stop_listening

    @property
    def idle(self) -> bool:
        """Whether the last stream has ended."""
        return self._running.done()

    def status(self) -> dict[str, object]:
        """Return our address as each TURN server of this network sees it, and which endpoints of services fail."""
        return {"relay_sources": self.publication.sources(), "relay_endpoints": self.relay.endpoints.status()}


def _section(config: Config) -> RelaySection:
    assert config.relay is not None
    return config.relay


def _ttl_s(config: Config) -> int:
    """Return the TTL of this network's DNS answers."""
    return config.dns.ttl_s if config.dns is not None else DEFAULT_TTL_S


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))
