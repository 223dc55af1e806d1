"""The gateway as a role: the gateway itself, its record, and its registrations on other networks' TURN servers."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

from crossnet.app import role_configs
from crossnet.app.readiness import Condition
from crossnet.app.role import FORGET_S, Role
from crossnet.config.sections import Config, GatewaySection
from crossnet.handover import Place
from discovery.model.mesh import Kind
from turnreg.gateway.gateway import Gateway
from turnreg.registrar.config import RegistrarConfig
from turnreg.registrar.registrar import Registrar


class GatewayRole(Role):
    """Lets other networks reach services of this one."""

    name: ClassVar[str] = "gateway"
    gateway: Gateway
    registrar: Registrar | None = None
    _running: asyncio.Task[None]

    async def open(self) -> None:
        """Bind, serve and register."""
        host, section = self.host, _section(self.host.config)
        config = role_configs.gateway_config(host.config, section, host.guard())
        self.gateway = gateway = Gateway(config, host.discovery, role_configs.keys(host.config), registry=host.registry)
        self.ledger = gateway.ledger
        if host.inherited:
            gateway.hold()  # until our predecessor, which has another epoch, has stopped
        await self.begin(gateway.open(partial(host.inherited.take, self.name)))
        self.listens(gateway.addresses)
        self._running = host.run(self.name, gateway.run())
        if section.turn:
            self._register(host.config)

    def publish(self) -> None:
        """Publish its address if relays may dial it directly; the registrar publishes allocations."""
        section = _section(self.host.config)
        if self.gateway.addresses:
            spec = role_configs.gateway_spec(section, self.gateway.addresses[0], self.gateway.epoch)
            self.host.discovery.publish(Kind.GATEWAY, section.id, spec)

    def _register(self, config: Config) -> None:
        self.registrar = Registrar(self._registrar_config(config), self.host.discovery, self.host.registry)
        self.host.run("registrar", self.registrar.run(self.gateway.take))

    def _registrar_config(self, config: Config) -> RegistrarConfig:
        return role_configs.registrar_config(config, _section(config), self.host.guard(), epoch=self.gateway.epoch)

    def predecessor_gone(self) -> None:
        """Accept direct connections of relays."""
        self.gateway.accept()

    @property
    def settled(self) -> bool:
        """Whether there is an allocation wherever one can be made."""
        return self.registrar is None or self.registrar.settled

    def changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield the change of live settings, such as rules, keys and limits, and then of the registrations."""
        del old
        config = role_configs.gateway_config(new, _section(new), self.gateway.config.guard)
        yield partial(self.gateway.reconfigure, config, role_configs.keys(new))
        if self.registrar is not None:
            yield partial(self.registrar.reconfigure, self._registrar_config(new))
        elif _section(new).turn:
            yield partial(self._register, new)

    def sockets(self) -> Iterator[tuple[Place, int]]:
        """Yield the listeners for direct connections of relays."""
        for place, number in self.gateway.listening():
            yield (self.name, *place), number

    def withdraw(self) -> None:
        """Withdraw all records; allocations stay until their streams have ended."""
        if self.registrar is not None:
            self.registrar.drain()
        if self.gateway.addresses:
            self.host.discovery.withdraw(Kind.GATEWAY, _section(self.host.config).id)

    def hand_over(self) -> None:
        """Leave the records to the successor; allocations stay until their streams have ended."""
        if self.registrar is not None:
            self.registrar.hand_over()

    def comes_until(self, now: float) -> float:
        """Return, after a handover, until when relays may not know our successor's allocations and use ours."""
        return now + FORGET_S if self.host.handed_over and self.registrar is not None else now

    def stop_listening(self) -> None:
        """Stop accepting direct connections of relays."""
        self.gateway.stop_listening()

    def stop_accepting(self) -> None:
        """Accept no new streams."""
        self.gateway.close()

    @property
    def idle(self) -> bool:
        """Whether the last stream has ended."""
        return self._running.done()

    async def give_back(self) -> None:
        """Release the allocations."""
        if self.registrar is not None:
            await self.registrar.close()

    def conditions(self) -> Iterator[Condition]:
        """Yield the condition that there is an allocation, if there is any network to register with."""
        if self.registrar is not None:
            states = {line["state"] for line in self.registrar.status()}
            lacking = bool(states) and "ready" not in states and states != {"standby"}
            yield Condition("allocation", ("a first allocation",) if lacking else ())

    def status(self) -> dict[str, object]:
        """Return the state of the registration with each TURN server, and which endpoints of services fail."""
        return {
            "registrations": self.registrar.status() if self.registrar is not None else [],
            "gateway_endpoints": self.gateway.endpoints.status(),
        }


def _section(config: Config) -> GatewaySection:
    assert config.gateway is not None
    return config.gateway
