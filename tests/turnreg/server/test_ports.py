"""The choice of a relayed port."""

import itertools
import random

from turnreg.server.ports import REST_S, PortRange


def ports(first: int, last: int, seed: int = 1) -> PortRange:
    return PortRange(first, last, random.Random(seed).randrange)


def test_every_port_once_in_random_order() -> None:
    found = list(ports(100, 199).candidates(0.0))
    assert sorted(found) == list(range(100, 200))
    assert found != sorted(found)
    assert found != list(ports(100, 199, seed=2).candidates(0.0))


def test_the_first_is_even_over_the_range() -> None:
    source = ports(10, 19)
    firsts = [next(source.candidates(0.0)) for _ in range(2000)]
    assert all(130 < firsts.count(port) < 270 for port in range(10, 20))


def test_a_few_of_a_large_range_are_cheap() -> None:
    draws = itertools.count()

    def randbelow(limit: int) -> int:
        next(draws)
        return limit - 1

    assert len(list(itertools.islice(PortRange(1024, 65_535, randbelow).candidates(0.0), 3))) == 3
    assert next(draws) < 5


def test_taken_ports_are_left_out_and_rested_ones_come_first() -> None:
    source = ports(1, 3)
    source.take(1)
    source.take(2)
    assert list(source.candidates(0.0)) == [3]
    source.give_back(2, now=0.0)
    assert list(source.candidates(1.0)) == [3, 2]
    source.give_back(1, now=0.0)
    source.take(1)
    assert list(source.candidates(1.0)) == [3, 2]
    assert sorted(source.candidates(REST_S)) == [2, 3]


def test_a_range_of_one() -> None:
    source = ports(5, 5)
    assert list(source.candidates(0.0)) == [5]
    source.take(5)
    assert list(source.candidates(0.0)) == []
