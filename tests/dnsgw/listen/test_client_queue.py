"""Packets that wait, by client."""

import pytest

from dnsgw.listen.client_queue import MAX_ALL, MAX_EACH, ClientQueue


def test_each_client_has_its_turn() -> None:
    crowd = ClientQueue()
    for n in range(3):
        crowd.put(b"aaaa", (b"a%d" % n, b"", b""))
    crowd.put(b"bbbb", (b"b", b"", b""))
    crowd.put(b"cccc", (b"c", b"", b""))
    assert [crowd.take()[0] for _ in range(len(crowd))] == [b"a0", b"b", b"c", b"a1", b"a2"]
    assert len(crowd) == 0
    with pytest.raises(StopIteration):
        crowd.take()


def test_excess_packets_are_dropped() -> None:
    crowd = ClientQueue()
    for _ in range(MAX_EACH + 5):
        crowd.put(b"aaaa", (b"a", b"", b""))
    assert (len(crowd), crowd.dropped) == (MAX_EACH, 5)
    for n in range(MAX_ALL):  # one each
        crowd.put(n.to_bytes(4, "big"), (b"x", b"", b""))
    assert len(crowd) == MAX_ALL
    assert crowd.dropped == 5 + MAX_EACH
