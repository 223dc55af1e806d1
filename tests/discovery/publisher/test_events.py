"""Events on Services: when they are written, and what the API server gets."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from discovery.publisher.events import MAX_MESSAGE, Due, EventSchedule, EventTiming, event_of
from discovery.publisher.export import Finding
from tests.discovery.publisher.test_role import PORTS, publishing, put_service, until
from tests.discovery.waiting import LogWaiter
from tests.support.kube_server import KubeServer, kube_server

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ORDERS, CART = ("shop", "orders"), ("shop", "cart")
ONE, TWO = Finding("One", "one is missing"), Finding("Two", "two is missing")
IMPATIENT = EventTiming(again_s=0.1, pause_s=0.0, refused_s=0.1)
ONCE = EventTiming(pause_s=0.0, refused_s=0.1)


def said(schedule: EventSchedule, now: float) -> list[tuple[str, str, int]]:
    """Write all Events that are due."""
    found = []
    while (due := schedule.next(now)) is not None:
        found.append((due.service[1], due.finding.reason, due.count))
        schedule.written(due, now)
    return found


def test_an_event_is_due_again_while_its_cause_lasts() -> None:
    schedule = EventSchedule(again_s=10)
    assert schedule.next_at() is None
    assert schedule.put(ORDERS, ("u1", "1"), [ONE, TWO])
    assert said(schedule, 0) == [("orders", "One", 1), ("orders", "Two", 1)]
    assert not schedule.put(ORDERS, ("u1", "2"), [ONE])
    assert (said(schedule, 9), schedule.next_at()) == ([], 10)
    assert schedule.put(CART, ("u2", "1"), [ONE])
    assert said(schedule, 10) == [("cart", "One", 1), ("orders", "One", 2)]
    schedule.put(ORDERS, ("u1", "3"), [])
    schedule.put(CART, ("", ""), [])
    assert (said(schedule, 99), schedule.next_at()) == ([], None)


def test_a_cause_that_returns_and_another_service_of_the_same_name_are_said_at_once() -> None:
    schedule = EventSchedule(again_s=10)
    schedule.put(ORDERS, ("u1", "1"), [ONE])
    assert said(schedule, 0) == [("orders", "One", 1)]
    schedule.put(ORDERS, ("u1", "2"), [])
    assert schedule.put(ORDERS, ("u1", "3"), [ONE])
    assert said(schedule, 1) == [("orders", "One", 1)]
    assert schedule.put(ORDERS, ("u9", "4"), [ONE])
    assert said(schedule, 2) == [("orders", "One", 1)]


def test_what_changed_while_it_was_written_is_not_written_again() -> None:
    schedule = EventSchedule(again_s=10)
    schedule.put(ORDERS, ("u1", "1"), [ONE])
    due = schedule.next(0)
    assert due is not None
    schedule.put(ORDERS, ("u1", "2"), [TWO])
    schedule.written(due, 0)
    assert said(schedule, 99) == [("orders", "Two", 1)]


def test_the_event_of_one_cause_has_one_name() -> None:
    def name(**changes: Any) -> str:
        values: dict[str, Any] = {"service": ORDERS, "uid": "u", "version": "1", "finding": ONE, "count": 1}
        return str(event_of(Due(**(values | changes)), "k8s", NOW)["metadata"]["name"])

    assert name() == name(version="2", count=7)
    assert len({name(), name(uid="v"), name(finding=TWO), name(service=CART)}) == 4
    assert name().startswith("orders.")
    long = event_of(Due(ORDERS, "u", "1", Finding("Long", "ü" * 2000), 1), "k8s", NOW)
    assert len(long["message"].encode()) <= MAX_MESSAGE


def events(kube: KubeServer) -> list[tuple[str, str, str]]:
    return [(event["involvedObject"]["name"], event["reason"], event["type"]) for event in kube.found("events")]


def put_misspelt(kube: KubeServer, export: str = "htps") -> None:
    put_service(kube, "orders", annotations={"crossnet.io/export": export})


@pytest.mark.anyio
async def test_a_service_says_what_is_not_exported_of_it(serve: Any, tmp_path: Path, logged: LogWaiter) -> None:
    async with kube_server() as kube, serve() as at:
        put_misspelt(kube)
        put_service(kube, "cart")
        alias = PORTS | {"type": "ExternalName", "externalName": "x.example"}
        kube.put("services", "shop", "alias", metadata={"annotations": {"crossnet.io/export": "true"}}, spec=alias)
        async with publishing(kube, at, tmp_path, timing=ONCE):
            await kube.until(lambda: len(kube.found("events")) == 2)
            assert events(kube) == [("alias", "ExternalName", "Warning"), ("orders", "UnknownPort", "Warning")]
            (event,) = (event for event in kube.found("events") if event["reason"] == "UnknownPort")
            (service,) = (found for found in kube.found("services") if found["metadata"]["name"] == "orders")
            assert event["involvedObject"]["uid"] == service["metadata"]["uid"]
            assert "'htps'; it has https" in event["message"]
            await until(at, {"cart.shop.svc.cluster.local": []})
            assert logged.count("'why': \"crossnet.io/export names ports that the Service does not have") == 1
            put_misspelt(kube, "https")
            await until(at, {"cart.shop.svc.cluster.local": [], "orders.shop.svc.cluster.local": []})
            assert len(kube.found("events")) == 2  # the past stays until the cluster forgets it


@pytest.mark.anyio
async def test_an_event_is_renewed_and_written_again_once_the_cluster_has_forgotten_it(
    serve: Any, tmp_path: Path
) -> None:
    def count(number: int) -> Callable[[], bool]:
        return lambda: [event["count"] for event in kube.found("events")] == [number]

    async with kube_server() as kube, serve() as at:
        put_misspelt(kube)
        async with publishing(kube, at, tmp_path, timing=IMPATIENT):
            await kube.until(count(3))
            name = kube.found("events")[0]["metadata"]["name"]
            kube.delete("events", "shop", name)
            await kube.until(lambda: len(kube.found("events")) == 1)
        async with publishing(kube, at, tmp_path, timing=IMPATIENT):  # a publisher that was restarted
            await kube.until(count(2))
            assert [event["metadata"]["name"] for event in kube.found("events")] == [name]


@pytest.mark.anyio
async def test_a_publisher_without_the_right_to_write_events_publishes(
    serve: Any, tmp_path: Path, logged: LogWaiter
) -> None:
    async with kube_server() as kube, serve() as at:
        kube.refuses_writes = True
        put_misspelt(kube)
        put_service(kube, "cart")
        async with publishing(kube, at, tmp_path, timing=ONCE):
            await logged.until("Events cannot be written")
            await until(at, {"cart.shop.svc.cluster.local": []})
            kube.refuses_writes = False
            async with asyncio.timeout(20):
                await kube.until(lambda: len(kube.found("events")) == 1)
        assert logged.count("Events cannot be written") == 1
