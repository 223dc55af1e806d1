"""Streams end without TIME_WAIT on the hosts that dial, so few local ports carry many streams a second."""

import asyncio
import hashlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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
    """Count a host's connections in TIME_WAIT (state 06) that keep one of its local ports. Accepted ones do not.

    Those of the test to the admin server of the part are left out: they stay on the host.
    """
    with ground.on(host):
        lines = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]]
    ends = [(*line[1].split(":"), line[2].partition(":")[0]) for line in lines if line[3] == "06"]
    return sum(address != peer and int(port, 16) >= FIRST_PORT for address, port, peer in ends)


class Asking:
    """Streams to a service that answers with a digest and the question, and ends first, as HTTP servers do that close."""

    def __init__(self, mesh: Mesh, port: int, ends: Counter[str]) -> None:
        self._mesh = mesh
        self.name = mesh.name(port)
        self.ends = ends
        """How streams ended, as both plain ends saw it. "ok": nothing is missing, and there was no reset."""

    async def ask(self, size: int) -> None:
        """Carry one stream."""
        question = os.urandom(size)
        client = await self._mesh.dial(self.name, behind=size.to_bytes(4, "big"))
        try:
            await client.send(question)
            answer = await read_all(client)
        except OSError as error:
            self.ends[f"client: {error}"] += 1
        else:
            is_right = answer == hashlib.sha256(question).digest() + question
            self.ends["ok" if is_right else f"client got {answer[:7]!r}"] += 1
            client.shutdown_write()
        finally:
            client.close()


@asynccontextmanager
async def asking(mesh: Mesh) -> AsyncIterator[Asking]:
    """Run the service while the block runs."""
    ends: Counter[str] = Counter()

    async def serve(stream: SocketStream) -> None:
        try:
            await stream.recv_exactly(len(client_hello(mesh.name(stream.local[1]))))
            question = await stream.recv_exactly(int.from_bytes(await stream.recv_exactly(4), "big"))
            await stream.send(hashlib.sha256(question).digest(), question)
            stream.shutdown_write()
            if await read_all(stream):
                ends["service: more bytes"] += 1
        except (OSError, EOFError) as error:
            ends[f"service: {error}"] += 1

    async with mesh.serving(serve) as port:
        yield Asking(mesh, port, ends)


@pytest.mark.parametrize("turn", TURNS)
async def test_two_hundred_streams_a_second_on_six_hundred_ports(tmp_path: Path, turn: str) -> None:
    with hosts() as ground:
        limit_ports(ground)
        with running_mesh(Mesh(tmp_path, ground, turn=turn)) as mesh:
            most = dict.fromkeys(DIALLERS, 0)
            room = asyncio.Semaphore(MOST_AT_ONCE)
            async with asking(mesh) as streams:

                async def one() -> None:
                    async with room:
                        await streams.ask(1000)

                began = time.monotonic()
                async with asyncio.TaskGroup() as group:
                    for number in range(STREAMS):
                        if streams.ends.total() - streams.ends["ok"] > 50:
                            break  # each failure takes seconds
                        async with room:
                            pass
                        group.create_task(one())
                        if number % STREAMS_PER_S == 0:
                            most = {host: max(most[host], time_waits(ground, host)) for host in DIALLERS}
                        with suppress(ValueError):
                            await asyncio.sleep(began + number / STREAMS_PER_S - time.monotonic())
                took = time.monotonic() - began
                await mesh.eventually("all are logged", lambda: len(mesh.events("relay")) >= streams.ends.total())
            print(f"\n{turn}: {STREAMS / took:.0f} streams/s, most in TIME_WAIT: {most}, ends: {dict(streams.ends)}")
            assert streams.ends == {"ok": STREAMS}
            lines = mesh.events("relay")
            assert {line["reason"] for line in lines} == {"ok"}
            again = sum(line["attempts"] for line in lines) - STREAMS  # READY can be late on a busy machine
            assert sum(line["reason"] != "ok" for line in mesh.events("gateway")) <= again
            assert not mesh.events("gateway", "bind_failed")
            assert max(most.values()) < PORTS / 10


@pytest.mark.parametrize("kind", ["second connections", "refused"])
@pytest.mark.parametrize("turn", TURNS)
async def test_other_ends_keep_no_port_either(tmp_path: Path, turn: str, kind: str) -> None:
    with hosts() as ground:
        limit_ports(ground)
        with running_mesh(Mesh(tmp_path, ground, turn=turn)) as mesh:
            async with asking(mesh) as streams, asyncio.TaskGroup() as group:
                if kind == "refused":
                    streams.name = mesh.name(1)  # nothing listens there
                for _ in range(40):
                    group.create_task(streams.ask(500_000))
            await mesh.eventually("all are logged", lambda: len(mesh.events("relay")) >= 40)
            lines = mesh.events("relay")
            if kind == "refused":
                assert {line["reason"] for line in lines} == {"dial_failed"}
            else:
                assert streams.ends == {"ok": 40}
                assert sum("second" in line for line in lines) > 20
            waiting = {host: time_waits(ground, host) for host in DIALLERS}
            print(f"\n{turn}, {kind}: in TIME_WAIT: {waiting}")
            assert max(waiting.values()) < 10
