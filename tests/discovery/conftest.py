"""A real server on loopback, real clients, and raw requests."""

import asyncio
import io
import json
import logging
import random
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict

from discovery.api import DiscoveryServer, DiscoveryServerConfig
from discovery.api.timing import TIMING, ServerTiming
from discovery.api.tokens import format_entry, make_entry, make_token
from discovery.api.watchers import LIMITS, WatchLimits
from discovery.client.client import DiscoveryClient
from discovery.model.mesh import Kind, Mesh
from discovery.store import MemoryStore, Store
from tests.discovery.waiting import LogWaiter

DEADLINE_S = 10.0


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Answer:
    """An answer."""

    status: int
    body: Any
    headers: CIMultiDict[str]


@dataclass
class Running:
    """A running server."""

    server: DiscoveryServer
    port: int
    session: aiohttp.ClientSession
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def store(self) -> Store:
        return self.server.store

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send a request, and check what all answers must have."""
        text = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        data = io.BytesIO(text) if text is not None else None
        all_headers = dict(headers or {})
        if token is not None:
            all_headers["Authorization"] = f"Bearer {token}"
        async with self.session.request(method, self.url + path, data=data, headers=all_headers) as response:
            answer = Answer(response.status, json.loads(await response.read()), CIMultiDict(response.headers))
        assert answer.headers["Crossnet-Epoch"] == self.store.epoch
        assert answer.headers["Content-Type"].startswith("application/json")
        if answer.status >= 400:
            assert set(answer.body) == {"error", "detail"}
        return answer

    @asynccontextmanager
    async def watch(
        self, query: str = "", token: str | None = None
    ) -> AsyncIterator[AsyncGenerator[dict[str, Any], None]]:
        """Watch. Yields the lines, without the empty ones."""
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        async with self.session.get(f"{self.url}/v1/watch{query}", headers=headers) as response:
            assert response.status == 200
            lines = _lines(response)
            yield lines
            await lines.aclose()


async def _lines(response: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any], None]:
    async with asyncio.timeout(DEADLINE_S):
        async for line in response.content:
            if line.strip():
                yield json.loads(line)


def free_port() -> int:
    """Return a port for a server that is restarted: below the range of ephemeral ports, so that no client gets it in between."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@pytest.fixture(name="free_port")
def free_port_fixture() -> int:
    return free_port()


@pytest.fixture
def serve() -> Any:
    @asynccontextmanager
    async def serve(
        store: Store | None = None,
        *,
        port: int = 0,
        timing: ServerTiming = TIMING,
        wall_clock: Callable[[], float] = time.time,
        watch_limits: WatchLimits = LIMITS,
        **settings: Any,
    ) -> AsyncIterator[Running]:
        config = DiscoveryServerConfig(listen=(("127.0.0.1", port or free_port()),), **settings)
        server = DiscoveryServer(
            config,
            store=store if store is not None else MemoryStore(),
            timing=timing,
            wall_clock=wall_clock,
            watch_limits=watch_limits,
        )
        scheme = "https" if config.tls_cert is not None else "http"
        async with server.serving() as addresses, aiohttp.ClientSession() as session:
            yield Running(server, addresses[0][1], session, scheme)

    return serve


@asynccontextmanager
async def running(client: DiscoveryClient) -> AsyncIterator[DiscoveryClient]:
    """Run a client while the context lasts, then close it."""
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as group:
        task = group.create_task(client.run())
        try:
            yield client
        except BaseException as error:  # noqa: BLE001 - raised below, and not inside an exception group
            failure = error
        finally:
            task.cancel()
    await client.close()
    if failure is not None:
        raise failure


@pytest.fixture
def run() -> Any:
    return running


async def until(client: DiscoveryClient, condition: Callable[[Mesh], bool]) -> Mesh:
    """Wait for a mesh that meets a condition."""
    seen = asyncio.Event()
    stop = client.subscribe(lambda mesh: seen.set() if condition(mesh) else None)
    try:
        if not (client.synced and condition(client.mesh)):
            async with asyncio.timeout(DEADLINE_S):
                await seen.wait()
    finally:
        stop()
    return client.mesh


@pytest.fixture(name="until")
def until_fixture() -> Any:
    return until


@dataclass
class TokensFile:
    """A tokens file, and the tokens in it."""

    path: Path
    tokens: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.tokens[name]


@pytest.fixture
def tokens(tmp_path: Path) -> TokensFile:
    """Tokens for two networks, a gateway, a relay and an operator."""
    every = list(Kind)
    given: dict[str, dict[str, Any]] = {
        "b": {"network": "b", "kinds": every, "names": ["*.shop.svc", "**.open"]},
        "c": {"network": "c", "kinds": every, "names": ["**"]},
        "gw-b": {"network": "b", "kinds": [Kind.ALLOCATION, Kind.GATEWAY]},
        "relay-b": {"network": "b", "kinds": [Kind.RELAY]},
        "operator": {"admin": True},
    }
    made = {name: make_token() for name in given}
    path = tmp_path / "tokens.yaml"
    path.write_text("\n".join(format_entry(make_entry(made[name], name=name, **given[name])) for name in given))
    return TokensFile(path, made)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def logged() -> Iterator[LogWaiter]:
    """Waits for log records. Only warnings are seen unless the test sets another level."""
    waiter = LogWaiter()
    logging.getLogger().addHandler(waiter)
    yield waiter
    logging.getLogger().removeHandler(waiter)
