"""Changes of a host's addresses, links and routes, as the real kernel tells them."""

import asyncio
import errno
import socket
import subprocess
from collections.abc import Iterator

import pytest

from sniproxy.engine.network_changes import NetworkChanges, source_towards
from tests.support.hosts import Namespace
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio


def ip(host: Namespace, *commands: str) -> None:
    with host.entered():
        subprocess.run(
            ["ip", "-batch", "-"],
            input="\n".join(commands) + "\n",
            text=True,
            check=True,
            capture_output=True,
            timeout=30,
        )


@pytest.fixture
def host() -> Iterator[Namespace]:
    made = Namespace()
    ip(
        made,
        "link add d0 type veth peer name d1",
        "link set d0 addrgenmode none",  # or its checks for duplicates are changes as well
        "link set d1 addrgenmode none",
        "link set d1 up",
        "link set d0 up",
        "address add 10.81.0.2/24 dev d0",
    )
    yield made
    made.close()


def listening(host: Namespace, calls: list[int], settle_s: float = 0.01) -> NetworkChanges:
    with host.entered():
        return NetworkChanges(lambda: calls.append(1), settle_s=settle_s)


CHANGES = {
    "address added": "address add 10.81.0.3/24 dev d0",
    "address gone": "address del 10.81.0.2/24 dev d0",
    "IPv6 address": "address add 2001:db8::1/64 dev d0 nodad",
    "route": "route add 10.82.0.0/24 via 10.81.0.1",
    "preferred source": "route replace 10.81.0.0/24 dev d0 src 10.81.0.2 metric 5",
    "link down": "link set d0 down",
    "rule": "rule add from 10.81.0.2 table 5",
}


@pytest.mark.netns
@pytest.mark.needs("netns", "ip")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_change_is_told(host: Namespace, change: str) -> None:
    calls: list[int] = []
    changes = listening(host, calls)
    try:
        ip(host, change)
        await eventually(lambda: bool(calls))
        calls.clear()
        ip(host, "address add 10.99.0.1/24 dev d0")  # and the next one
        await eventually(lambda: bool(calls))
    finally:
        changes.close()


@pytest.mark.netns
@pytest.mark.needs("netns", "ip")
async def test_many_changes_are_few_calls_and_none_is_missed(host: Namespace) -> None:
    """Far more than the kernel's queue holds."""
    calls: list[int] = []
    changes = listening(host, calls, settle_s=0.2)
    routes = [f"route add 10.{100 + n // 250}.{n % 250}.0/24 via 10.81.0.1" for n in range(5000)]
    try:
        ip(host, *routes)
        await eventually(lambda: bool(calls))
        await asyncio.sleep(0.5)
        assert len(calls) < 100
        calls.clear()
        ip(host, "address add 10.81.0.3/24 dev d0")
        await eventually(lambda: bool(calls))
    finally:
        changes.close()


@pytest.mark.netns
@pytest.mark.needs("netns", "ip")
async def test_after_close_nothing_is_called(host: Namespace) -> None:
    calls: list[int] = []
    changes = listening(host, calls, settle_s=0.05)
    ip(host, "address add 10.81.0.3/24 dev d0")
    await asyncio.sleep(0.01)
    changes.close()
    changes.close()
    await asyncio.sleep(0.1)
    assert not calls


async def test_a_sandbox_without_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    make = socket.socket

    def without_netlink(family: int = socket.AF_INET, *arguments: int) -> socket.socket:
        if family == socket.AF_NETLINK:
            raise PermissionError(errno.EPERM, "not in this sandbox")
        return make(family, *arguments)

    monkeypatch.setattr(socket, "socket", without_netlink)
    NetworkChanges(lambda: None).close()


@pytest.mark.netns
@pytest.mark.needs("netns", "ip")
def test_the_source_towards_an_address(host: Namespace) -> None:
    with host.entered():
        assert source_towards("10.81.0.9") == "10.81.0.2"
        assert source_towards("10.82.0.9") is None
    ip(host, "address add fe80::7/64 dev d0 nodad", "link set lo up")
    with host.entered():
        assert source_towards("fe80::9%d0") == "fe80::7"
        assert source_towards("fe80::9%nosuch") is None
        assert source_towards("::1") == "::1"
