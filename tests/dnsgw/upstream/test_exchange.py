"""The state of a question to upstream."""

from dnsgw.message.question import probe_question
from dnsgw.upstream.exchange import Exchange, Failure


def test_an_exchange_begins_with_nothing_open() -> None:
    exchange = Exchange(b"key", probe_question(), 1.8, tcp=False, order=())
    assert (exchange.attempts, exchange.refusals, exchange.open, exchange.waiting) == (0, 0, [], [])
    assert (exchange.trust, exchange.tcp, exchange.fallback, exchange.timer) == ({}, False, None, None)


def test_every_failure_is_answered() -> None:
    from dnsgw.pending_query import FAILURES

    assert set(FAILURES) == set(Failure)
