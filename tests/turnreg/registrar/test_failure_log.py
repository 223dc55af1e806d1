"""A failure that repeats is not logged over and over."""

from turnreg.client.control_connection import TurnError, TurnReason
from turnreg.registrar.failure_log import LOG_AGAIN_S, FailureLog


def said(log: FailureLog, reason: TurnReason, now: float, detail: str = "") -> bool:
    admitted = log.admits(TurnError(reason, detail), now)
    if admitted:
        log.logged(now)
    return admitted


def test_a_repeated_failure_is_logged_once_a_minute_with_a_count() -> None:
    log = FailureLog()
    assert said(log, TurnReason.TIMEOUT, 10)
    assert not said(log, TurnReason.TIMEOUT, 11)
    assert not said(log, TurnReason.TIMEOUT, 10 + LOG_AGAIN_S - 1)
    assert log.suppressed == 2
    assert said(log, TurnReason.TIMEOUT, 10 + LOG_AGAIN_S)
    assert log.suppressed == 0


def test_a_failure_with_another_reason_is_logged_at_once() -> None:
    log = FailureLog()
    assert said(log, TurnReason.TIMEOUT, 10)
    assert said(log, TurnReason.QUOTA, 11)
    assert said(log, TurnReason.TIMEOUT, 12)


def test_a_refused_address_is_logged_once_until_it_changes() -> None:
    log = FailureLog()
    assert said(log, TurnReason.REFUSED_ADDRESS, 10, "192.0.2.1 is refused")
    assert not said(log, TurnReason.REFUSED_ADDRESS, 10 + 10 * LOG_AGAIN_S, "192.0.2.1 is refused")
    assert said(log, TurnReason.REFUSED_ADDRESS, 10 + 10 * LOG_AGAIN_S, "192.0.2.2 is refused")


def test_a_failure_after_a_success_is_logged_at_once() -> None:
    log = FailureLog()
    assert said(log, TurnReason.TIMEOUT, 10)
    log.succeeded()
    assert said(log, TurnReason.TIMEOUT, 11)
