"""A relay under attack: real clients are served, and afterwards nothing is left of the attackers."""

import asyncio
import contextlib
import gc
import os
import resource
from collections.abc import Iterator

import pytest

from sniproxy.engine import SocketStream
from sniproxy.formats.client_hello import HelloReader
from sniproxy.streams.stream_log import StreamRecord
from tests.support.hellos import client_hello, padding
from tests.support.relays import DOMAIN, Running, a_relay, name_of
from tests.support.scripted_gateways import scripted, silent
from tests.support.streams import read_all, turns
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
def many_files() -> Iterator[int]:
    """Raise the limit of open files as far as possible; return how many the test may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield wanted - descriptors() - 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def echo(stream: SocketStream) -> None:
    while data := await stream.recv():
        await stream.send(data)
    stream.shutdown_write()


async def drop(stream: SocketStream) -> None:
    """Read everything up to the end or a reset."""
    with contextlib.suppress(OSError):
        await read_all(stream)


async def ask(running: Running, name: str) -> None:
    """Be a real client."""
    client = await running.dial(name, behind=b"question")
    client.shutdown_write()
    assert await read_all(client) == client_hello(name) + b"question"
    client.close()


async def test_slow_hellos_keep_no_real_client_out() -> None:
    """500 clients send a byte now and then, and would for ever: each is closed at its deadline."""
    hello = client_hello("orders.shop.example", padding(5000))
    async with a_relay(hello_timeout_s=1.5) as running:
        name = name_of(await running.serve(echo))
        slow = [await running.connect() for _ in range(500)]
        served = 0
        async with asyncio.TaskGroup() as group:

            async def drip(client: SocketStream, number: int) -> None:
                for byte in hello:
                    try:
                        await client.send(bytes([byte]))
                    except OSError:
                        return
                    await asyncio.sleep(0.2 + number / 5000)

            dripping = [group.create_task(drip(client, number)) for number, client in enumerate(slow)]
            while len(running.relay.ledger) > 1:
                await ask(running, name)
                served += 1
            for task in dripping:
                task.cancel()
        assert served, "while they dripped"
        for client in slow:
            assert await read_all(client) == b""
            client.close()
        assert running.counted("hello_timeout") == 500
        assert running.counted("ok") == served


@pytest.mark.parametrize("ended_by", ["client's end", "client's reset", "service's end"])
async def test_idle_streams_leave_nothing_behind(ended_by: str, many_files: int) -> None:
    """Hundreds are opened, idle and ended; then there are as many descriptors and tasks as before."""
    total = min(1000 if ended_by == "client's end" else 300, many_files // 4)
    served: list[SocketStream] = []
    arrived = asyncio.Semaphore(0)

    async def hold(stream: SocketStream) -> None:
        served.append(stream)
        arrived.release()
        with contextlib.suppress(OSError):
            while await stream.recv():  # without the time limit of `read_all`
                pass

    async with a_relay() as running:
        name = name_of(await running.serve(hold))
        await ask_once(running, name)
        before = descriptors(), len(asyncio.all_tasks())
        await arrived.acquire()
        served.clear()
        clients = [await running.dial(name) for _ in range(total)]
        async with asyncio.timeout(20):
            for _ in range(total):
                await arrived.acquire()
        assert len(running.relay.ledger) == total
        assert descriptors() == before[0] + 4 * total
        for client, service in zip(clients, served, strict=True):
            match ended_by:
                case "client's end":
                    client.shutdown_write()
                case "client's reset":
                    client.reset()
                case _:
                    service.shutdown_write()
                    client.shutdown_write()
        await running.settled()
        for client in clients:
            client.close()
        await eventually(lambda: (descriptors(), len(asyncio.all_tasks())) == before)
        assert {line["reason"] for line in running.log.events[1:]} == {
            "client_reset" if ended_by == "client's reset" else "ok"
        }


async def ask_once(running: Running, name: str) -> None:
    """Open and end one stream, so that whatever is made once has been made."""
    await turns()  # all tasks of the relay have begun
    tasks = len(asyncio.all_tasks())
    client = await running.dial(name)
    client.shutdown_write()
    await read_all(client)
    client.close()
    await all_but(tasks)
    gc.collect()


async def all_but(tasks: int) -> None:
    """Wait until all tasks but so many have ended, and the callbacks at their ends have run."""
    await eventually(lambda: len(asyncio.all_tasks()) == tasks)
    await turns()


@pytest.mark.parametrize("kind", ["served", "reset", "silent", "unknown", "not TLS", "nobody there"])
async def test_an_ended_stream_leaves_no_cycle_for_the_garbage_collector(kind: str) -> None:
    """A collection over thousands of streams pauses the whole process, and reference cycles would make it frequent."""
    async with a_relay(hello_timeout_s=0.05) as running:
        name = name_of(await running.serve(drop))

        says = {
            "silent": b"\x16",
            "unknown": client_hello("stranger.example"),
            "not TLS": b"GET /",
            "nobody there": client_hello(name_of(1)),
        }

        async def one() -> None:
            client = await running.connect()
            await client.send(says.get(kind, client_hello(name)))
            if kind == "reset":
                await running.opened()
                client.reset()
            else:
                if kind == "served":
                    client.shutdown_write()
                await read_all(client)
                client.close()
            await running.settled()
            await all_but(tasks)

        await turns()  # all tasks of the relay have begun
        tasks = len(asyncio.all_tasks())
        await one()
        gc.collect()
        gc.disable()
        try:
            await one()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [item for item in gc.garbage if isinstance(item, SocketStream | StreamRecord | HelloReader)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert left == []


async def test_clients_that_go_while_their_stream_is_opened_leave_nothing() -> None:
    async with scripted(silent) as gateway, a_relay() as running:
        running.add(gateway)
        name = f"p8443-10-1-0-5.b.{DOMAIN}"
        before = descriptors()
        clients = [await running.dial(name) for _ in range(100)]
        await eventually(lambda: gateway.connections == 100)
        for client in clients:
            client.reset()
        for account in tuple(running.relay.ledger._live):
            assert account.end is not None
            account.end()
        await running.settled()
        for visit in gateway.visits:
            visit.stream.close()
        await eventually(lambda: descriptors() <= before)


async def test_floods_of_connections_without_a_hello() -> None:
    """Connections that are refused at once, as fast as they can be made. The relay serves on and keeps nothing of them."""
    kinds = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff",
        client_hello("stranger.example"),
        b"\x80",
        os.urandom(50),
    ]
    async with a_relay() as running:
        name = name_of(await running.serve(echo))
        await ask(running, name)
        before = descriptors()
        for number in range(500):
            client = await running.connect()
            await client.send(kinds[number % len(kinds)])
            client.close()
            if number % 100 == 50:
                await ask(running, name)
        await running.settled()
        await ask(running, name)
        await eventually(lambda: descriptors() <= before)
        counted = {line["reason"] for line in running.log.events}
    assert counted <= {"ok", "not_tls", "bad_hello", "unknown_name", "client_reset"}
