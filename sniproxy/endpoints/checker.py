"""Active checks: endpoints of services whose record asks for it are tried now and then, so that no stream has to find them dead.

Every relay and gateway of the service's network checks for itself, since each may see a different network.
"""

import asyncio
import heapq
import random
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from discovery.model.addresses import Address, BadAddress, parse_endpoint
from discovery.model.mesh import Mesh
from sniproxy.endpoints.dialer import EndpointDialer
from sniproxy.endpoints.health import Endpoint
from sniproxy.engine.connect import connect

TIMEOUT_S: Final = 3.0
"""For a check: as long as a stream's connect takes at most."""

MAX_AT_ONCE: Final = 64
"""Checks at a time; what is due waits."""

MAX_TARGETS: Final = 20_000
"""Endpoints that are checked. Further ones are found by streams alone."""

_HANDSHAKE: Final = 0x16  # the record type of a ServerHello, RFC 8446 section 5.1


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint to check."""

    service: str
    """Name and port."""
    endpoint: Endpoint
    server_name: str
    check: Literal["tcp", "tls"]
    interval_s: int


class EndpointChecker:
    """Checks the endpoints of one network's services, for one relay or gateway."""

    def __init__(
        self,
        dialer: EndpointDialer,
        network: str,
        allowed: Callable[[Address, int, Mesh], bool],
        *,
        timeout_s: float = TIMEOUT_S,
        max_at_once: int = MAX_AT_ONCE,
    ) -> None:
        """Check nothing yet.

        Args:
            dialer: remembers what is found.
            network: whose services are checked.
            allowed: whether an address and port may be dialled at all.
        """
        self._dialer = dialer
        self._network = network
        self._allowed = allowed
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(max_at_once)
        self._mesh = Mesh.EMPTY
        self._targets: dict[Target, None] = {}
        self._due: list[tuple[float, int, Target]] = []
        self._changed = asyncio.Event()
        self._closed = False
        self._running: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        """How many endpoints are checked."""
        return len(self._targets)

    def follow(self, mesh: Mesh) -> None:
        """Check the endpoints of this view from now on."""
        if mesh is not self._mesh:
            self._mesh = mesh
            self.reconsider()

    def reconsider(self) -> None:
        """Find the endpoints to check again: `allowed` may decide otherwise now."""
        before, mesh = self._targets, self._mesh
        self._targets = {}
        for target in self._wanted(mesh):
            self._targets[target] = None
            if len(self._targets) == MAX_TARGETS:
                break
        new = self._targets.keys() - before.keys()
        now = asyncio.get_running_loop().time() if new else 0.0
        for target in new:
            # Spread over the first interval: a relay that starts must not dial everything at one moment.
            heapq.heappush(self._due, (now + random.uniform(0, target.interval_s), id(target), target))
            self._changed.set()
        kept = {target.endpoint for target in self._targets}
        for target in before.keys() - self._targets.keys():
            if target.endpoint not in kept:
                self._dialer.note_success(target.service, target.endpoint, by_check=True)  # nobody asks any more

    def _wanted(self, mesh: Mesh) -> Iterator[Target]:
        for record in mesh.services(self._network):
            health = record.spec.health
            if health is None:
                continue
            for port, endpoints in record.spec.ports.items():
                for text in endpoints:
                    try:
                        address, number = parse_endpoint(text)
                    except BadAddress:
                        continue
                    if self._allowed(address, number, mesh):
                        service = f"{record.spec.name}:{port}"
                        endpoint = str(address), number
                        yield Target(service, endpoint, record.spec.name, health.check, health.interval_s)

    def close(self) -> None:
        """Check no more, and cut checks that are running."""
        self._closed = True
        self._changed.set()
        for task in self._running:
            task.cancel()

    async def run(self) -> None:
        """Check, until `close`."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while not self._closed:
                self._changed.clear()
                wait_s = self._due[0][0] - loop.time() if self._due else None
                if wait_s is None or wait_s > 0:
                    try:
                        async with asyncio.timeout(wait_s):
                            await self._changed.wait()
                    except TimeoutError:
                        pass
                    continue
                _, _, target = heapq.heappop(self._due)
                if target in self._targets:
                    await self._slots.acquire()
                    task = group.create_task(self._check(target))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)

    async def _check(self, target: Target) -> None:
        try:
            try:
                await probe(target, self._timeout_s)
            except OSError as error:
                why = f"{target.check} check: {error.strerror or error or 'no answer'}"
                if target in self._targets:
                    self._dialer.note_failure(target.service, target.endpoint, why, next_check_s=target.interval_s)
            else:
                if target in self._targets:
                    self._dialer.note_success(target.service, target.endpoint, by_check=True)
        finally:
            self._slots.release()
            if target in self._targets:
                heapq.heappush(self._due, (asyncio.get_running_loop().time() + target.interval_s, id(target), target))
                self._changed.set()


async def probe(target: Target, timeout_s: float) -> None:
    """Check an endpoint once. Raises OSError (TimeoutError included) if it fails."""
    address, port = target.endpoint
    stream = await connect(address, port, timeout_s=timeout_s)
    try:
        if target.check == "tls":
            async with asyncio.timeout(timeout_s):
                await stream.send(client_hello(target.server_name))
                answer = await stream.recv(1)
            if not answer:
                raise ConnectionAbortedError(None, "closed before an answer to the ClientHello")
            if answer[0] != _HANDSHAKE:
                raise ConnectionAbortedError(None, f"answered a ClientHello with {answer.hex()}, not with a handshake")
    finally:
        stream.close()


def client_hello(server_name: str) -> bytes:
    """Return a ClientHello for this name, as this machine's OpenSSL writes it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what the service is, its clients verify
    written = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), written, server_hostname=server_name).do_handshake()
    except ssl.SSLWantReadError:
        pass
    return written.read()
