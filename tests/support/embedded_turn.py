"""The embedded TURN server on a loop of its own in a thread, so that tests can be plain blocking programs."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from turnreg.server import Limits, TurnServer, TurnServerConfig


@dataclass
class Embedded:
    """A running server."""

    address: str
    port: int
    registry: CollectorRegistry
    server: TurnServer
    loop: asyncio.AbstractEventLoop

    @property
    def udp(self) -> tuple[str, int]:
        return self.server.udp_addresses[0]

    @property
    def tls(self) -> tuple[str, int]:
        return self.server.tls_addresses[0]

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def embedded(
    *,
    address: str = "127.0.0.1",
    relay_addresses: tuple[str, ...] = ("127.0.0.1",),
    users: dict[str, str] | None = None,
    secrets: tuple[str, ...] = (),
    ports: tuple[int, int] = (20_000, 32_000),
    limits: Limits | None = None,
    allowed_peers: tuple[str, ...] | TargetList = ("127.0.0.0/8", "::1/128"),
    nonce_lifetime_s: float = 3600.0,
    unauthenticated_timeout_s: float = 30.0,
    max_unauthenticated: int = 4096,
    **more: Any,
) -> Iterator[Embedded]:
    """Run a server with user u, password p and realm lab while the block runs; `more` is for TurnServerConfig."""
    config = TurnServerConfig(
        listen=((address, 0),),
        relay_addresses=relay_addresses,
        realm="lab",
        port_min=ports[0],
        port_max=ports[1],
        users={"u": "p", "v": "q"} if users is None else users,
        secrets=secrets,
        allowed_peers=allowed_peers if isinstance(allowed_peers, TargetList) else TargetList.parse(allowed_peers),
        limits=limits or Limits(),
        nonce_lifetime_s=nonce_lifetime_s,
        unauthenticated_timeout_s=unauthenticated_timeout_s,
        max_unauthenticated=max_unauthenticated,
        **more,
    )
    registry = CollectorRegistry()
    ready: threading.Event = threading.Event()
    box: list[Embedded] = []
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    failures: list[BaseException] = []

    async def main() -> None:
        ended = asyncio.Event()
        async with TurnServer.serving(config, registry=registry) as server:
            stop.append((asyncio.get_running_loop(), ended))
            box.append(Embedded(*server.addresses[0], registry, server, asyncio.get_running_loop()))
            ready.set()
            await ended.wait()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main())
        except BaseException as exc:  # noqa: BLE001 - raised in the test's thread
            failures.append(exc)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="turn server")
    thread.start()
    ready.wait()
    try:
        if failures:
            raise failures[0]
        yield box[0]
    finally:
        if stop:
            loop, ended = stop[0]
            loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        assert not thread.is_alive()
    if failures:
        raise failures[0]
