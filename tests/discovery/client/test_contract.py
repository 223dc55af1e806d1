"""Subscribers that are added, removed, and fail."""

import logging

import pytest

from discovery.client.contract import DiscoveryError, Subscribers
from discovery.model.mesh import Mesh


def test_subscribers_are_called_in_order_until_they_unsubscribe() -> None:
    told: list[str] = []
    subscribers = Subscribers()
    first = subscribers.add(lambda _: told.append("first"))
    subscribers.add(lambda _: told.append("second"))
    subscribers.notify(Mesh.EMPTY)
    first()
    first()
    subscribers.notify(Mesh.EMPTY)
    assert told == ["first", "second", "second"]


def test_a_subscriber_may_unsubscribe_during_notification() -> None:
    told: list[str] = []
    subscribers = Subscribers()
    subscribers.add(lambda _: leave())
    leave = subscribers.add(lambda _: told.append("leaving"))
    subscribers.notify(Mesh.EMPTY)
    subscribers.notify(Mesh.EMPTY)
    assert told == ["leaving"]


def test_a_failing_subscriber_does_not_affect_others(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    subscribers = Subscribers()
    subscribers.add(lambda _: 1 / 0)  # type: ignore[arg-type]
    subscribers.add(lambda _: told.append("told"))
    with caplog.at_level(logging.ERROR):
        subscribers.notify(Mesh.EMPTY)
    assert told == ["told"]
    assert "ZeroDivisionError" in caplog.text


def test_errors_have_code_and_detail() -> None:
    error = DiscoveryError("forbidden", "no")
    assert (error.code, error.detail, str(error)) == ("forbidden", "no", "forbidden: no")
