"""Connections without credentials: bounded, the oldest goes first."""

from turnreg.server.admission import Strangers


def test_the_oldest_goes_when_it_is_crowded() -> None:
    strangers: Strangers[str] = Strangers(2)
    assert strangers.admit("a") is None
    assert strangers.admit("b") is None
    assert strangers.admit("c") == "a"
    assert len(strangers) == 2
    strangers.dismiss("a")  # it notices later that it had to go
    strangers.dismiss("b")
    assert strangers.admit("d") is None
    assert strangers.admit("e") == "c"
