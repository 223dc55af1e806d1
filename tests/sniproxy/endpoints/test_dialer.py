"""A service's endpoints dialled for streams: who is reached, what is remembered, what is said."""

import errno
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from sniproxy.endpoints.dialer import EndpointDialer, NoAnswer
from sniproxy.endpoints.health import Endpoint
from sniproxy.engine.local_ports import NoLocalPort

pytestmark = pytest.mark.anyio

LONG_S = 30.0


class Dialer(EndpointDialer):
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.now = 1000.0
        super().__init__("gateway", self.registry, clock=lambda: self.now)

    async def reach(
        self, *endpoints: Endpoint, service: str = "orders", allowed: Callable[[Endpoint], bool] = lambda _: True
    ) -> tuple[Endpoint, int]:
        connected = await self.attempts(service, endpoints, allowed).connect(timeout_s=LONG_S)
        connected.stream.close()
        return connected.endpoint, connected.attempts

    def sample(self, name: str) -> float | None:
        return self.registry.get_sample_value(name)


@pytest.fixture
def good() -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@pytest.fixture
def bad() -> object:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        yield bound.getsockname()


async def test_a_dead_endpoint_is_met_once(good: Endpoint, bad: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dialer = Dialer()
    assert await dialer.reach(bad, good) == (good, 2)
    for _ in range(10):
        assert await dialer.reach(bad, good) == (good, 1)
    assert dialer.sample("crossnet_gateway_endpoint_failures_total") == 1
    assert dialer.sample("crossnet_gateway_endpoints_left_out") == 1
    assert [shown["endpoint"] for shown in dialer.status()] == [f"127.0.0.1:{bad[1]}"]
    [record] = caplog.records
    assert (record.getMessage(), record.event["failures"]) == ("endpoint_left_out", 1)  # type: ignore[attr-defined]


async def test_one_that_is_back_is_taken_again(good: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dialer = Dialer()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        flapping = bound.getsockname()
        assert await dialer.reach(flapping, good) == (good, 2)
        bound.listen()
        dialer.now += 3600
        assert {(await dialer.reach(flapping, good))[0] for _ in range(2)} == {flapping, good}
    assert dialer.status() == []
    assert [record.getMessage() for record in caplog.records] == ["endpoint_left_out", "endpoint_back"]


async def test_what_no_endpoint_said_is_told_in_one_line(bad: Endpoint) -> None:
    dialer = Dialer()
    with pytest.raises(NoAnswer) as refused:
        await dialer.reach(bad, bad, bad, bad, bad)
    shown = f"127.0.0.1:{bad[1]}: Connection refused"
    assert refused.value.detail == "; ".join([shown] * 3) + "; and 2 more"
    assert refused.value.attempts == 5


async def test_one_that_may_not_be_dialled_is_left_out_of_the_tries(good: Endpoint, bad: Endpoint) -> None:
    dialer = Dialer()
    assert await dialer.reach(bad, good, allowed=lambda endpoint: endpoint == good) == (good, 1)
    with pytest.raises(NoAnswer) as refused:
        await dialer.reach(bad, good, allowed=lambda _: False)
    assert (refused.value.detail, refused.value.attempts) == ("", 0)


async def test_a_stream_may_go_on_behind_one_that_was_reached(good: Endpoint, bad: Endpoint) -> None:
    dialer = Dialer()
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = server.getsockname()
        attempts = dialer.attempts("orders", [bad, good, other], lambda _: True)
        reached = []
        for _ in range(2):
            connected = await attempts.connect(timeout_s=LONG_S)
            connected.stream.close()
            reached.append(connected.endpoint)
        assert reached == [good, other]
        with pytest.raises(NoAnswer):
            await attempts.connect(timeout_s=LONG_S)
    assert attempts.made == 3


async def test_nothing_is_remembered_of_an_address(bad: Endpoint) -> None:
    dialer = Dialer()
    with pytest.raises(NoAnswer):
        await dialer.reach(bad, service="")
    assert dialer.status() == []
    assert dialer.sample("crossnet_gateway_endpoint_failures_total") == 0


async def test_one_that_was_reached_may_be_found_wanting(good: Endpoint) -> None:
    dialer = Dialer()
    attempts = dialer.attempts("orders", [good, good], lambda _: True)
    connected = await attempts.connect(timeout_s=LONG_S)
    connected.stream.close()
    attempts.reject(good, "took no PROXY header")
    assert [shown["why"] for shown in dialer.status()] == ["took no PROXY header"]


async def test_a_lack_of_local_ports_is_not_the_endpoints_fault(good: Endpoint) -> None:
    async def none_free(
        endpoints: Iterator[Endpoint], *, on_failed: Callable[[Endpoint, OSError], None], **_limits: Any
    ) -> None:
        for endpoint in endpoints:
            on_failed(endpoint, NoLocalPort(errno.EADDRNOTAVAIL, "no local port is free"))

    dialer = EndpointDialer("gateway", CollectorRegistry(), connect=none_free)
    for _ in range(5):
        with pytest.raises(NoAnswer, match="no local port is free"):
            await dialer.attempts("orders", [good], lambda _: True).connect(timeout_s=LONG_S)
    assert not dialer.status()
