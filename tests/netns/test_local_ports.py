"""Streams end without TIME_WAIT on the hosts that dial, so few local ports carry many streams a second."""

import asyncio
import hashlib
import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from sniproxy.engine import SocketStream
from tests.support.hellos import client_hello
from tests.support.hosts import Hosts, hosts
from tests.support.processes import TURNS, Mesh, running_mesh
from tests.support.streams import read_all

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.netns,
    pytest.mark.needs("netns", "ip", "nft", "tc"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

FIRST_PORT = 61_000
"""Above the relayed ports of the TURN server and the services of the test."""
PORTS = 600
STREAMS_PER_S = 200
STREAMS = 2 * 60 * STREAMS_PER_S
MOST_AT_ONCE = 100
"""A slow machine carries fewer a second, but not more at once, which would need more ports for another reason."""

DIALLERS = ("relay", "gateway")


def limit_ports(ground: Hosts) -> None:
    for host in DIALLERS:
        with ground.on(host):
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{FIRST_PORT} {FIRST_PORT + PORTS - 1}\n")


def time_waits(ground: Hosts, host: str) -> int:
    """Count a host's connections in TIME_WAIT (state 06) that keep one of its local ports. Accepted ones do not."""
    with ground.on(host):
        lines = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]]
    return sum(line[3] == "06" and int(line[1].partition(":")[2], 16) >= FIRST_PORT for line in lines)


@pytest.mark.parametrize("turn", TURNS)
async def test_two_hundred_streams_a_second_on_six_hundred_ports(tmp_path: Path, turn: str) -> None:
    """The service ends each stream first, as HTTP servers do that close. A reset at either plain end fails the test."""
    hello = b""
    ends: Counter[str] = Counter()

    async def serve(stream: SocketStream) -> None:
        try:
            await stream.recv_exactly(len(hello))
            question = await stream.recv_exactly(1000)
            await stream.send(hashlib.sha256(question).digest(), question * 3)
            stream.shutdown_write()
            ends["service: more bytes"] += bool(await read_all(stream))
        except (OSError, EOFError) as error:
            ends[f"service: {error}"] += 1

    async def ask(name: str) -> None:
        question = os.urandom(1000)
        client = await mesh.dial(name, behind=question)
        try:
            answer = await read_all(client)
        except OSError as error:
            ends[f"client: {error.strerror}"] += 1
        else:
            ends[
                "ok" if answer == hashlib.sha256(question).digest() + question * 3 else f"client got {answer[:7]!r}"
            ] += 1
            client.shutdown_write()
        finally:
            client.close()

    with hosts() as ground:
        limit_ports(ground)
        with running_mesh(Mesh(tmp_path, ground, turn=turn)) as mesh:
            async with mesh.serving(serve) as port:
                name = mesh.name(port)
                hello = client_hello(name)
                most = dict.fromkeys(DIALLERS, 0)
                began = time.monotonic()
                room = asyncio.Semaphore(MOST_AT_ONCE)

                async def one() -> None:
                    async with room:
                        await ask(name)

                async with asyncio.TaskGroup() as group:
                    for number in range(STREAMS):
                        if ends.total() - ends["ok"] > 50:
                            break  # each failure takes seconds
                        async with room:
                            pass
                        group.create_task(one())
                        if number % STREAMS_PER_S == 0:
                            most = {host: max(most[host], time_waits(ground, host)) for host in DIALLERS}
                        with suppress(ValueError):
                            await asyncio.sleep(began + number / STREAMS_PER_S - time.monotonic())
                took = time.monotonic() - began
                await mesh.eventually("all are logged", lambda: len(mesh.events("relay")) >= ends.total())
            print(f"\n{turn}: {STREAMS / took:.0f} streams/s, most in TIME_WAIT: {most}, ends: {dict(+ends)}")
            assert +ends == {"ok": STREAMS}
            lines = mesh.events("relay")
            assert {line["reason"] for line in lines} == {"ok"}
            again = sum(line["attempts"] for line in lines) - STREAMS  # READY can be late on a busy machine
            assert sum(line["reason"] != "ok" for line in mesh.events("gateway")) <= again
            assert not mesh.events("gateway", "bind_failed")
            assert max(most.values()) < PORTS / 10
