"""The hub of watchers: one encoding for all readers, bounded queues, and a backlog that ends with sync."""

import asyncio
import json
from typing import Any

import pytest

from discovery.api.tokens import OPEN, Principal
from discovery.api.watchers import NoRoom, WatchHub, WatchLimits
from discovery.model.mesh import Deletion, Kind, NetworkSpec, ServiceSpec
from discovery.model.spec import NEGOTIATED
from discovery.store import MemoryStore

pytestmark = pytest.mark.anyio

OTHER = Principal(name="c", network="c", kinds=frozenset(Kind), owner="c")
KEY = (Kind.SERVICE, "b", "s")
SERVICE = ServiceSpec(name="o.s", ports={"8443": ["10.1.0.5:8443"]})


def lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


async def test_a_line_is_encoded_once_for_readers_with_the_same_view() -> None:
    store = MemoryStore()
    hub = WatchHub(store)
    first, second, third = hub.add(OPEN), hub.add(OPEN), hub.add(OTHER)
    await store.put(KEY, SERVICE)
    one, two, three = first._lines[0][1], second._lines[0][1], third._lines[0][1]
    assert one is two
    assert b"10.1.0.5" in one
    assert b"10.1.0.5" not in three
    hub.remove(second)
    await store.delete(KEY)
    assert len(first._lines) == 2
    assert len(second._lines) == 1
    assert len(hub) == 2


async def test_negotiated_fields_are_for_readers_who_know_them() -> None:
    store = MemoryStore()
    hub = WatchHub(store)
    spec = ServiceSpec(name="db-0.o.s", ports={"8443": []}, port_names={"https": 8443}, member_of="o.s")
    old, half, new = hub.add(OPEN), hub.add(OTHER, frozenset({"service.port_names"})), hub.add(OTHER, NEGOTIATED)
    await store.put(KEY, spec)
    for reader, fields in ((old, ()), (half, ("port_names",)), (new, ("port_names", "member_of"))):
        (line,) = lines(reader.next_batch(0))
        assert set(line["record"]["spec"]) == {"name", "ports", *fields}
        _, batches = await hub.backlog(reader.principal, None, None, reader.fields)
        assert lines(b"".join(batches))[1]["record"] == line["record"]
    await store.put(KEY, SERVICE)
    _, batches = await hub.backlog(OTHER, None, None, NEGOTIATED)
    assert "port_names" not in lines(b"".join(batches))[1]["record"]["spec"]


async def test_lines_of_the_backlog_are_not_sent_twice() -> None:
    store = MemoryStore()
    hub = WatchHub(store)
    watcher = hub.add(OPEN)
    await store.put(KEY, SERVICE)
    current, batches = await hub.backlog(OPEN, None, None)
    assert current == 1
    assert [line["type"] for line in lines(b"".join(batches))] == ["reset", "put", "sync"]
    await store.put(KEY, SERVICE)
    assert [line["revision"] for line in lines(watcher.next_batch(current))] == [2]
    assert watcher.next_batch(current) == b""
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(watcher.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        await store.delete(KEY)
    assert [line["type"] for line in lines(watcher.next_batch(current))] == ["delete"]


async def test_a_backlog_is_sent_in_batches() -> None:
    store = MemoryStore()
    hub = WatchHub(store, limits=WatchLimits(batch_bytes=500))
    for number in range(50):
        await store.put((Kind.NETWORK, f"n{number}", f"n{number}"), NetworkSpec())
    for revision in (0, None):
        _, batches = await hub.backlog(OPEN, revision, store.epoch)
        pieces = list(batches)
        assert len(pieces) > 5
        told = lines(b"".join(pieces))
        assert [line["type"] for line in told].count("put") == 50
        assert told[-1] == {"revision": 50, "type": "sync", "epoch": store.epoch}


@pytest.mark.parametrize("limits", [WatchLimits(queued_lines=3), WatchLimits(queued_bytes=3)])
async def test_a_queue_is_bounded(limits: WatchLimits) -> None:
    store = MemoryStore()
    hub = WatchHub(store, limits=limits)
    watcher = hub.add(OPEN)
    for _ in range(10):
        await store.put(KEY, SERVICE)
    assert watcher.overrun
    assert len(watcher._lines) == 0
    await watcher.wait()


async def test_closing_wakes_everybody() -> None:
    store = MemoryStore()
    hub = WatchHub(store)
    watcher = hub.add(OPEN)
    hub.close()
    await watcher.wait()
    assert watcher.closed
    await store.put(KEY, SERVICE)
    assert watcher.next_batch(0) == b""


async def test_changes_of_one_revision_are_marked_as_such() -> None:
    store = MemoryStore()
    hub = WatchHub(store)
    watcher = hub.add(OPEN)
    records = [await store.put((Kind.NETWORK, name, name), NetworkSpec()) for name in "bcd"]
    watcher.next_batch(store.revision)
    hub._on_changes([Deletion(records[0].key, 4), Deletion(records[1].key, 4), Deletion(records[2].key, 5)])
    told = lines(watcher.next_batch(0))
    assert [(line["revision"], line.get("more", False)) for line in told] == [(4, True), (4, False), (5, False)]


async def test_new_readers_get_the_current_records_that_they_may_see() -> None:
    store = MemoryStore()
    hub = WatchHub(store)
    await store.put(KEY, SERVICE)

    async def told(principal: Principal) -> list[tuple[str, str]]:
        _, batches = await hub.backlog(principal, None, None)
        return [
            (line["record"]["id"], str(line["record"]["spec"].get("ports", "")))
            for line in lines(b"".join(batches))
            if line["type"] == "put"
        ]

    for _ in range(2):
        assert await told(OPEN) == [("s", "{'8443': ['10.1.0.5:8443']}")]
        assert await told(OTHER) == [("s", "{'8443': []}")]
    await store.put((Kind.NETWORK, "c", "c"), NetworkSpec())
    await store.put(KEY, ServiceSpec(name="o.s", ports={"1": ["10.1.0.6:1"]}))
    assert sorted(await told(OPEN)) == [("c", ""), ("s", "{'1': ['10.1.0.6:1']}")]
    assert sorted(await told(OTHER)) == [("c", ""), ("s", "{'1': []}")]
    await store.delete(KEY)
    assert await told(OPEN) == await told(OTHER) == [("c", "")]


def who(network: str, owner: str) -> Principal:
    return Principal(name=owner, network=network, kinds=frozenset(), owner=owner)


async def test_a_network_that_has_all_watches_loses_some_to_others() -> None:
    hub = WatchHub(MemoryStore(), most=10, most_per_network=8)
    greedy = [hub.add(who("c", "c-1")) for _ in range(8)]
    with pytest.raises(NoRoom, match="8 watches of network 'c'"):
        hub.add(who("c", "c-1"))
    for number in range(5):
        hub.add(who("b", f"b-{number}"))
    assert [watcher.closed for watcher in greedy] == [False] * 5 + [True] * 3, "the latest go first"
    with pytest.raises(NoRoom, match="10 watches are open"):
        hub.add(who("b", "b-5"))
    hub.add(who("d", "d"))


async def test_a_token_that_has_all_watches_of_its_network_loses_some_to_other_tokens() -> None:
    hub = WatchHub(MemoryStore(), most=10, most_per_network=4)
    greedy = [hub.add(who("c", "c-1")) for _ in range(4)]
    hub.add(who("c", "c-2"))
    assert [watcher.closed for watcher in greedy] == [False, False, False, True]
