"""Endpoints that are checked by real connections: which, how often, and what follows."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
import trustme
from prometheus_client import CollectorRegistry

from discovery.model.mesh import AnyRecord, Kind, ServiceSpec
from discovery.model.spec import HealthCheck
from sniproxy.endpoints.checker import EndpointChecker, Target, probe
from sniproxy.endpoints.dialer import EndpointDialer
from sniproxy.engine import Listener, SocketStream
from tests.support.fixed_discovery import FixedDiscovery, record
from tests.support.streams import silent_listener
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio

NAME = "orders.shop.example"


def service(*endpoints: str, check: Literal["tcp", "tls"] | None = "tcp", name: str = NAME) -> AnyRecord:
    health = None if check is None else HealthCheck(check=check, interval_s=1)
    return record(Kind.SERVICE, "b", name, ServiceSpec(name=name, ports={"8443": list(endpoints)}, health=health))


def checker(dialer: EndpointDialer, *, allows: bool = True, timeout_s: float = 0.2) -> EndpointChecker:
    return EndpointChecker(dialer, "b", lambda *_: allows, timeout_s=timeout_s)


def a_dialer() -> EndpointDialer:
    return EndpointDialer("gateway", CollectorRegistry())


@asynccontextmanager
async def checking(made: EndpointChecker, *records: AnyRecord) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        made.follow(FixedDiscovery(*records).mesh)
        group.create_task(made.run())
        try:
            yield
        finally:
            made.close()


@asynccontextmanager
async def serving(handle: Any) -> AsyncIterator[int]:
    listener = await Listener.open("127.0.0.1", 0)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(listener.serve(handle))
        try:
            yield listener.address[1]
        finally:
            listener.close()
            task.cancel()


async def test_a_dead_endpoint_is_left_out_before_any_stream_meets_it() -> None:
    dialer = a_dialer()
    async with serving(SocketStream.recv) as port:
        with silent_listener() as silent:
            async with checking(checker(dialer), service(f"127.0.0.1:{port}", f"127.0.0.1:{silent}")):
                await eventually(lambda: dialer.health.left_out)
    assert [line["endpoint"] for line in dialer.status()] == [f"127.0.0.1:{silent}"]
    assert "tcp check" in dialer.status()[0]["why"]


async def test_one_that_is_back_is_found_by_the_next_check() -> None:
    dialer = a_dialer()
    listener = await Listener.open("127.0.0.1", 0)
    address, port = listener.address
    listener.close()
    async with checking(checker(dialer), service(f"{address}:{port}")):
        await eventually(lambda: dialer.health.left_out)
        again = await Listener.open(address, port)
        await eventually(lambda: not dialer.health.left_out)
        again.close()


async def test_it_is_checked_again_and_again() -> None:
    seen = asyncio.Semaphore(0)

    async def count(_: SocketStream) -> None:
        seen.release()

    async with serving(count) as port, checking(checker(a_dialer()), service(f"127.0.0.1:{port}")):
        async with asyncio.timeout(20):
            for _ in range(3):
                await seen.acquire()


async def test_what_is_not_asked_for_or_not_allowed_is_not_checked() -> None:
    made = checker(a_dialer())
    made.follow(FixedDiscovery(service("127.0.0.1:1", check=None)).mesh)
    assert made.count == 0
    refusing = checker(a_dialer(), allows=False)
    refusing.follow(FixedDiscovery(service("127.0.0.1:1")).mesh)
    assert refusing.count == 0


async def test_an_endpoint_that_is_checked_no_more_is_left_out_no_more() -> None:
    dialer = a_dialer()
    made = checker(dialer)
    async with checking(made, service("127.0.0.1:1")):
        await eventually(lambda: dialer.health.left_out)
        made.follow(FixedDiscovery(service("127.0.0.1:1", check=None)).mesh)
        assert dialer.health.left_out == 0
        assert made.count == 0


async def test_closing_cuts_a_check_that_is_running() -> None:
    with silent_listener() as silent:
        made = checker(a_dialer(), timeout_s=60)
        async with asyncio.timeout(20):
            async with checking(made, service(f"127.0.0.1:{silent}")):
                await eventually(lambda: made._running)


@asynccontextmanager
async def tls_service(*, wants_certificate: bool) -> AsyncIterator[int]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    if wants_certificate:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


def target(port: int, check: Literal["tcp", "tls"]) -> Target:
    return Target("orders:8443", ("127.0.0.1", port), NAME, check, 1)


@pytest.mark.parametrize("wants_certificate", [False, True])
async def test_a_tls_check_needs_no_certificate_of_ours(wants_certificate: bool) -> None:
    async with tls_service(wants_certificate=wants_certificate) as port:
        await probe(target(port, "tls"), 5.0)


async def test_a_tls_check_of_something_else_fails() -> None:
    async def http(stream: SocketStream) -> None:
        await stream.recv()
        await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def close(stream: SocketStream) -> None:
        await stream.recv()

    async def hang(stream: SocketStream) -> None:
        await asyncio.Event().wait()

    for handle, why in ((http, "not with a handshake"), (close, "closed before"), (hang, None)):
        async with serving(handle) as port:
            await probe(target(port, "tcp"), 5.0)
            with pytest.raises(OSError, match=why):
                await probe(target(port, "tls"), 0.2)
