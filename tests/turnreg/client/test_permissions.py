"""Permissions, with a function instead of a server."""

import asyncio
from collections.abc import Callable

import pytest

from tests.support.waiting import eventually
from turnreg.client.control_connection import TurnError, TurnReason, request
from turnreg.client.permissions import MAX_PERMISSIONS, PERMISSIONS_PER_REQUEST, Permissions
from turnreg.stun.message import Attribute, Message, Method

pytestmark = pytest.mark.anyio


class Desk:
    """Answer CreatePermission; refuse what is in `bad`."""

    def __init__(self, *bad: str, reason: TurnReason = TurnReason.FORBIDDEN) -> None:
        self.bad, self.reason = set(bad), reason
        self.asked: list[list[str]] = []

    async def __call__(self, method: Method, fill: Callable[[Message], Message]) -> Message:
        assert method is Method.CREATE_PERMISSION
        message = fill(request(method))
        message.pack()  # fits
        addresses = [address for address, port in message.xor_addresses(Attribute.XOR_PEER_ADDRESS) if port == 0]
        self.asked.append(addresses)
        if self.bad.intersection(addresses):
            raise TurnError(self.reason, "as told")
        return message.success()

    def permissions(self, refresh_s: float = 200, refused_retry_s: float = 30) -> Permissions:
        return Permissions(record="r", ask=self, refresh_s=refresh_s, refused_retry_s=refused_retry_s)


async def test_many_addresses_take_few_requests() -> None:
    desk = Desk()
    permissions = desk.permissions()
    wanted = frozenset(f"10.0.{n // 250}.{n % 250}" for n in range(1000))
    permissions.want(wanted)
    await permissions.ask()
    assert permissions.granted == wanted
    assert len(desk.asked) == -(-1000 // PERMISSIONS_PER_REQUEST)
    await permissions.ask()
    assert len(desk.asked) == -(-1000 // PERMISSIONS_PER_REQUEST)


async def test_too_many_addresses(caplog: pytest.LogCaptureFixture) -> None:
    permissions = Desk().permissions()
    permissions.want(frozenset(f"10.1.{n // 250}.{n % 250}" for n in range(MAX_PERMISSIONS + 1)))
    await permissions.ask()
    assert len(permissions.granted) == MAX_PERMISSIONS
    assert "1000 are admitted" in vars(caplog.records[-1])["event"]["detail"]


async def test_one_bad_address_is_found_by_halving() -> None:
    desk = Desk("10.0.0.17")
    permissions = desk.permissions()
    permissions.want(frozenset(f"10.0.0.{n}" for n in range(1, 33)))
    await permissions.ask()
    assert permissions.refused == {"10.0.0.17": "as told"}
    assert len(permissions.granted) == 31
    assert len(desk.asked) == 11


async def test_a_refused_address_is_asked_for_again_alone() -> None:
    desk = Desk("10.0.0.2")
    permissions = desk.permissions(refused_retry_s=0)
    permissions.want(frozenset({"10.0.0.1", "10.0.0.2"}))
    await permissions.ask()
    desk.bad.clear()
    desk.asked.clear()
    await permissions.ask()
    assert desk.asked == [["10.0.0.2"]]
    assert permissions.granted == {"10.0.0.1", "10.0.0.2"}
    assert not permissions.refused


async def test_what_is_wanted_changes() -> None:
    desk = Desk("10.0.0.2")
    permissions = desk.permissions()
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(permissions.keep())
        permissions.want(frozenset({"10.0.0.1", "10.0.0.2"}))
        await eventually(lambda: permissions.granted == {"10.0.0.1"})
        permissions.want(frozenset({"10.0.0.3"}))
        await eventually(lambda: permissions.granted == {"10.0.0.3"})
        assert permissions.refused == {}
        assert permissions.wants("10.0.0.3")
        assert not permissions.wants("10.0.0.1")
        permissions.want(frozenset({"10.0.0.1", "10.0.0.3"}))
        await eventually(lambda: permissions.granted == {"10.0.0.1", "10.0.0.3"})
        assert desk.asked[-1] == ["10.0.0.1"]
        keeping.cancel()


async def test_all_are_refreshed_together_and_for_ever() -> None:
    desk = Desk()
    permissions = desk.permissions(refresh_s=0.05)
    permissions.want(frozenset({"10.0.0.1", "10.0.0.2"}))
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(permissions.keep())
        await eventually(lambda: len(desk.asked) > 3)
        keeping.cancel()
    assert all(asked == ["10.0.0.1", "10.0.0.2"] for asked in desk.asked)


async def test_no_refresh_where_nothing_is_wanted() -> None:
    desk = Desk()
    permissions = desk.permissions(refresh_s=0.001)
    await permissions.ask()
    assert desk.asked == []


async def test_losing_the_allocation_is_not_about_the_address() -> None:
    permissions = Desk("10.0.0.1", reason=TurnReason.MISMATCH).permissions()
    permissions.want(frozenset({"10.0.0.1", "10.0.0.2"}))
    with pytest.raises(TurnError, match="as told"):
        await permissions.ask()
