"""What roles are given: subscribers that come, go and fail."""

import logging

import pytest

from discovery.client.contract import DiscoveryError, Subscribers
from discovery.model.mesh import Mesh


def test_subscribers_are_told_in_order_until_they_leave() -> None:
    told: list[str] = []
    subscribers = Subscribers()
    first = subscribers.add(lambda _: told.append("first"))
    subscribers.add(lambda _: told.append("second"))
    subscribers.notify(Mesh.EMPTY)
    first()
    first()
    subscribers.notify(Mesh.EMPTY)
    assert told == ["first", "second", "second"]


def test_one_may_leave_while_all_are_told() -> None:
    told: list[str] = []
    subscribers = Subscribers()
    subscribers.add(lambda _: leave())
    leave = subscribers.add(lambda _: told.append("leaving"))
    subscribers.notify(Mesh.EMPTY)
    subscribers.notify(Mesh.EMPTY)
    assert told == ["leaving"]


def test_one_that_fails_hurts_no_other(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    subscribers = Subscribers()
    subscribers.add(lambda _: 1 / 0)  # type: ignore[arg-type]
    subscribers.add(lambda _: told.append("told"))
    with caplog.at_level(logging.ERROR):
        subscribers.notify(Mesh.EMPTY)
    assert told == ["told"]
    assert "ZeroDivisionError" in caplog.text


def test_errors_tell_code_and_detail() -> None:
    error = DiscoveryError("forbidden", "no")
    assert (error.code, error.detail, str(error)) == ("forbidden", "no", "forbidden: no")
