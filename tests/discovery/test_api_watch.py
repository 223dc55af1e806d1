"""Watches over real HTTP: what they send, where they resume, and when the server ends them."""

import asyncio
import logging
from typing import Any

import aiohttp
import pytest

from discovery.api.timing import ServerTiming, WatchTiming
from discovery.api.watchers import WatchLimits
from discovery.model.mesh import Kind, ServiceSpec
from discovery.store import MemoryStore
from tests.discovery.bodies import RELAY, VIP
from tests.discovery.waiting import LogWaiter

pytestmark = pytest.mark.anyio


async def test_a_watch_sends_all_records_and_then_each_change(serve: Any) -> None:
    async with serve() as at:
        made = await at.ask("PUT", "/v1/records/relay/a/r", RELAY)
        epoch = at.store.epoch
        async with at.watch() as lines:
            assert await anext(lines) == {"revision": 1, "type": "reset", "epoch": epoch}
            assert await anext(lines) == {"revision": 1, "type": "put", "record": made.body}
            assert await anext(lines) == {"revision": 1, "type": "sync", "epoch": epoch}
            await at.ask("PUT", "/v1/records/vip/b/v", VIP)
            line = await anext(lines)
            assert (line["revision"], line["type"], line["record"]["kind"]) == (2, "put", "vip")
            await at.ask("DELETE", "/v1/records/vip/b/v")
            line = await anext(lines)
            assert line == {"revision": 3, "type": "delete", "record": {"kind": "vip", "network": "b", "id": "v"}}


async def test_a_watch_resumes_from_a_revision(serve: Any) -> None:
    async with serve(MemoryStore(max_tombstones=1)) as at:
        for name in ("v1", "v2"):
            await at.ask("PUT", f"/v1/records/vip/b/{name}", VIP)
        epoch = at.store.epoch

        async def told(query: str) -> list[tuple[str, int]]:
            seen = []
            async with at.watch(query) as lines:
                async for line in lines:
                    seen.append((line["type"], line["revision"]))
                    if line["type"] == "sync":
                        break
            return seen

        assert await told("?from=1") == [("put", 2), ("sync", 2)]
        assert await told(f"?from=2&epoch={epoch}") == [("sync", 2)]
        everything = [("reset", 2), ("put", 1), ("put", 2), ("sync", 2)]
        assert await told("?from=2&epoch=another") == everything
        assert await told("?from=9") == everything
        assert await told("?from=") == everything
        for name in ("v1", "v2"):
            await at.ask("DELETE", f"/v1/records/vip/b/{name}")
        assert await told("?from=3") == [("delete", 4), ("sync", 4)]
        assert await told("?from=2") == [("reset", 4), ("sync", 4)]  # the deletion at revision 3 is forgotten


async def test_a_watcher_that_does_not_keep_up_is_reset(serve: Any) -> None:
    async with serve(watch_limits=WatchLimits(queued_bytes=200_000)) as at:
        async with at.watch() as lines:
            assert (await anext(lines))["type"] == "reset"
            assert (await anext(lines))["type"] == "sync"
            # The client reads nothing while the server writes far more than socket buffers and queue can hold.
            big = ServiceSpec(name="o.s", ports={"1": ["10.1.0.5:8443"] * 1000})
            for _ in range(600):
                await at.store.put((Kind.SERVICE, "b", "s"), big)
                await asyncio.sleep(0)
            seen = [line["type"] async for line in lines]
        assert seen[-1] == "reset"
        assert set(seen[:-1]) == {"put"}
        assert len(seen) < 600


async def test_a_quiet_watch_has_a_heartbeat(serve: Any) -> None:
    async with (
        serve(timing=ServerTiming(watch=WatchTiming(heartbeat_s=0.02))) as at,
        at.session.get(f"{at.url}/v1/watch") as response,
    ):
        lines = [await response.content.readline() for _ in range(5)]
        assert lines[2:] == [b"\n"] * 3


async def test_watches_end_when_the_server_does(serve: Any) -> None:
    async with aiohttp.ClientSession() as session:
        async with serve() as at:
            response = await session.get(f"{at.url}/v1/watch")
            assert b"reset" in await response.content.readline()
            assert b"sync" in await response.content.readline()
        assert await response.content.read() == b""


async def test_a_watcher_that_reads_nothing_is_cut_off(
    serve: Any, logged: LogWaiter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(timing=ServerTiming(watch=WatchTiming(write_timeout_s=0.1))) as at:
        big = ServiceSpec(name="o.s", ports={"1": ["10.1.0.5:8443"] * 1000})
        for number in range(400):
            await at.store.put((Kind.SERVICE, "b", f"s{number}"), big)
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port, limit=1)
        writer.write(b"GET /v1/watch HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await logged.until("read nothing")
        data = b""
        try:
            while piece := await reader.read(1_000_000):
                data = piece
        except ConnectionResetError:
            pass
        assert not data.endswith(b"0\r\n\r\n")  # a complete answer would end like this, but this one was cut off
        writer.close()
        assert len(at.server._hub) == 0
