"""Gateways that listen on an address of their own. The relay dials them if `direct` allows it."""

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence

from discovery.model.addresses import refusal
from discovery.model.lookup import Place
from discovery.model.mesh import Kind, Mesh
from discovery.model.spec import FRAMED, GatewaySpec
from sniproxy.engine import Listener, SocketStream
from sniproxy.transport.base import (
    Accepted,
    Candidate,
    OnStream,
    Traits,
    TransportConfig,
    endpoint_in,
    framed_candidate,
)
from sniproxy.transport.tcp import DialsTcp

DIRECT = Traits(name="direct", rank=10)


class DirectTransport(DialsTcp):
    """The relay's side: gateways that can be dialled directly."""

    traits = DIRECT
    lacks = "no gateway that relay.direct allows"

    def __init__(self, config: TransportConfig) -> None:
        self._config = config

    def candidates(self, place: Place, mesh: Mesh) -> Iterator[Candidate]:
        """Find the gateways that may be dialled."""
        allowed = self._config.direct
        for gateway in mesh.gateways(place.network):
            endpoint = endpoint_in(gateway.spec.address)
            if endpoint is None or FRAMED not in gateway.spec.proto:
                continue
            if allowed.allows(*endpoint) and refusal(endpoint[0], allowed) is None:
                near = self._config.is_near(gateway.spec.zone)
                yield framed_candidate(DIRECT, place, endpoint, gateway, near=near)

    def offers(self, candidate: Candidate, mesh: Mesh) -> bool:
        """Return whether the gateway's record still has this address."""
        record = mesh.record(Kind.GATEWAY, candidate.network, candidate.addressee)
        if record is None or not isinstance(record.spec, GatewaySpec):
            return False
        endpoint = endpoint_in(record.spec.address)
        return endpoint is not None and (str(endpoint[0]), endpoint[1]) == (candidate.address, candidate.port)


class DirectAcceptor:
    """The gateway's side: its listeners. `open` binds, `run` accepts until `close`."""

    def __init__(self, addressee: str, listen: Sequence[tuple[str, int]]) -> None:
        """Prepare listeners on these addresses and ports. `addressee` is the id of the gateway's record."""
        self._addressee = addressee
        self._listen = listen
        self._listeners: list[Listener] = []
        self._accepting = asyncio.Event()
        self._accepting.set()

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where it listens, with the ports that the kernel chose for port 0."""
        return tuple(listener.address for listener in self._listeners)

    async def open(self, inherited: Callable[[str, int], socket.socket | None]) -> None:
        """Bind all listening addresses. Raises an OSError that names the one that failed; none stays open then.

        Args:
            inherited: returns a socket that already listens there, from the process that this one replaces.
        """
        try:
            for address, port in self._listen:
                sock = inherited(address, port)
                self._listeners.append(await Listener.open(address, port) if sock is None else Listener(sock))
        except OSError:
            self.close()
            raise

    def listening(self) -> list[tuple[tuple[str, int], int]]:
        """Return the listening sockets by configured address and port, for a process that replaces this one."""
        return [(place, listener.fileno()) for place, listener in zip(self._listen, self._listeners, strict=True)]

    def hold(self) -> None:
        """Leave relays in the listeners' queues until `accept`. To be called before `run`."""
        self._accepting.clear()

    def accept(self) -> None:
        """Begin to accept after `hold`."""
        self._accepting.set()

    async def run(self, on_stream: OnStream) -> None:
        """Accept connections and pass them to `on_stream`, until `close`."""

        def take(stream: SocketStream) -> None:
            on_stream(Accepted(stream=stream, traits=DIRECT, addressee=self._addressee))

        await self._accepting.wait()
        async with asyncio.TaskGroup() as group:
            for listener in self._listeners:
                group.create_task(listener.run(take))

    def close(self) -> None:
        """Stop accepting."""
        self._accepting.set()
        for listener in self._listeners:
            listener.close()
