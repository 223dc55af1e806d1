"""Both TURN servers behind one interface, and an allocation on one of them, for the tests of our client.

@pytest.mark.parametrize("kind", BOTH)
async def test_…(kind: str) -> None:
    with turn_server(kind) as server:
        async with held(server) as holding:
            reader, writer = await holding.peer()
            stream = await holding.stream()
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.coturn import coturn
from tests.support.embedded_turn import embedded
from turnreg.client.allocation import Allocation, BindResult, Bound, Credentials, Timing, TurnError
from turnreg.server import Limits

COTURN = pytest.param("coturn", marks=[pytest.mark.interop, pytest.mark.needs("turnserver")])
BOTH = ["embedded", COTURN]

LOOPBACK = frozenset({"127.0.0.1"})
LOGIN = Credentials(username="u", password="p")


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where a server listens. It accepts LOGIN, or REST credentials from its secret."""

    address: str
    port: int


@contextlib.contextmanager
def turn_server(
    kind: str,
    *,
    address: str = "127.0.0.1",
    secret: str | None = None,
    nonce_lifetime_s: int | None = None,
    quota: int | None = None,
) -> Iterator[RunningServer]:
    if kind == "coturn":
        extra = [f"--stale-nonce={nonce_lifetime_s}"] if nonce_lifetime_s is not None else []
        extra += [f"--user-quota={quota}"] if quota is not None else []
        with coturn(secret=secret, address=address, extra=extra) as stock:
            yield RunningServer(stock.address, stock.port)
    else:
        limits = Limits(max_allocations_per_account=quota) if quota is not None else Limits()
        with embedded(
            address=address,
            relay_addresses=(address,),
            users={"u": "p"} if secret is None else {},
            secrets=() if secret is None else (secret,),
            limits=limits,
            nonce_lifetime_s=float(nonce_lifetime_s or 3600),
        ) as ours:
            yield RunningServer(ours.address, ours.port)


@dataclass
class Holding:
    """An allocation that is ready, with the streams and results it has delivered."""

    allocation: Allocation
    streams: asyncio.Queue[Bound]
    results: list[BindResult] = field(default_factory=list)
    taken: list[Bound] = field(default_factory=list)

    async def stream(self) -> Bound:
        """The next stream that was bound; closed at the end."""
        async with asyncio.timeout(10):
            self.taken.append(await self.streams.get())
        return self.taken[-1]

    async def peer(self, source: str | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the relayed address, as a relay would."""
        assert self.allocation.relayed is not None
        local = (source, 0) if source is not None else None
        return await asyncio.open_connection(*self.allocation.relayed, local_addr=local)


def allocation_on(
    server: RunningServer,
    streams: asyncio.Queue[Bound],
    results: list[BindResult],
    *,
    credentials: Credentials = LOGIN,
    peers: frozenset[str] = LOOPBACK,
    timing: Timing | None = None,
    **options: Any,
) -> Allocation:
    return Allocation(
        address=server.address,
        port=server.port,
        credentials=credentials,
        on_stream=streams.put_nowait,
        via="a",
        turn="turn-1",
        record="gw-1.a.turn-1",
        peers=peers,
        on_bind=results.append,
        timing=timing,
        **options,
    )


@contextlib.asynccontextmanager
async def held(
    server: RunningServer,
    *,
    credentials: Credentials = LOGIN,
    peers: frozenset[str] = LOOPBACK,
    timing: Timing | None = None,
    **options: int,
) -> AsyncIterator[Holding]:
    """Hold an allocation, ready, while the block runs; close it and its streams after."""
    streams: asyncio.Queue[Bound] = asyncio.Queue()
    results: list[BindResult] = []
    allocation = allocation_on(server, streams, results, credentials=credentials, peers=peers, timing=timing, **options)
    ready = asyncio.Event()
    lost: list[TurnError] = []

    async def run() -> None:
        try:
            await allocation.run(ready.set)
        except TurnError as exc:
            lost.append(exc)
            ready.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(run())
        try:
            async with asyncio.timeout(10):
                await ready.wait()
            assert not lost, lost
            holding = Holding(allocation, streams, results)
            yield holding
        finally:
            await allocation.close()
    while not streams.empty():
        holding.taken.append(streams.get_nowait())
    for bound in holding.taken:
        bound.stream.close()
    assert not lost, lost


def listens(endpoint: tuple[str, int]) -> bool:
    """Tell whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection(endpoint, timeout=1):
        return True
    return False
