"""Connections without credentials are limited, and a flood displaces only itself."""

from hypothesis import given
from hypothesis import strategies as st

from turnreg.server.unauthenticated import UnauthenticatedConnections


def test_the_oldest_goes_when_it_is_crowded() -> None:
    strangers: UnauthenticatedConnections[str] = UnauthenticatedConnections(2)
    assert strangers.admit("a", "1") is None
    assert strangers.admit("b", "2") is None
    assert strangers.admit("c", "3") == "a"
    assert len(strangers) == 2
    strangers.dismiss("a")  # it notices later that it had to go
    strangers.dismiss("b")
    assert strangers.admit("d", "4") is None
    assert strangers.admit("e", "5") == "c"


def test_a_flood_from_one_address_leaves_the_others_alone() -> None:
    strangers: UnauthenticatedConnections[object] = UnauthenticatedConnections(100)
    slow = object()
    strangers.admit(slow, "far away")
    gone = [strangers.admit(object(), "flood") for _ in range(1000)]
    assert slow not in gone
    another = object()
    assert strangers.admit(another, "also far") not in (None, slow)
    assert not {slow, another} & {strangers.admit(object(), "flood") for _ in range(1000)}
    assert len(strangers) == 100


def test_all_of_the_room_is_for_one_client_while_nobody_else_wants_it() -> None:
    strangers: UnauthenticatedConnections[int] = UnauthenticatedConnections(100)
    assert [strangers.admit(number, "gateway") for number in range(100)] == [None] * 100
    assert strangers.admit(100, "gateway") == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 40)), max_size=200))
def test_never_more_than_the_limit_and_none_forgotten(steps: list[tuple[bool, int, int]]) -> None:
    strangers: UnauthenticatedConnections[int] = UnauthenticatedConnections(8)
    there: set[int] = set()
    for comes, client, number in steps:
        if comes and number not in there:
            gone = strangers.admit(number, str(client))
            assert gone is None or gone in there
            assert (gone is not None) == (len(there) == 8)
            there = (there - {gone}) | {number}
        else:
            strangers.dismiss(number)
            there.discard(number)
        assert len(strangers) == len(there)
    for number in there:
        strangers.dismiss(number)
    assert not strangers._of, "nothing is kept of clients that are gone"
