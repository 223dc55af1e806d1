"""Limits: what counts as one client, what an idle one may open at once, and that nothing grows without bound."""

from ipaddress import ip_address

import pytest

from sniproxy.access.client_limits import BURST_S, Admission, Budget, Limits

A, B = ip_address("10.0.0.1"), ip_address("10.0.0.2")


def test_streams_of_one_client_are_counted_apart() -> None:
    admission = Admission(Limits(max_streams=2, new_streams_per_s=0))
    assert [admission.admit(A, 0), admission.admit(A, 0)] == [None, None]
    assert "max_streams_per_client" in str(admission.admit(A, 0))
    assert admission.admit(B, 0) is None
    admission.leave(A)
    assert admission.admit(A, 0) is None


def test_an_ipv6_client_is_its_slash_64() -> None:
    admission = Admission(Limits(max_streams=1, new_streams_per_s=0))
    assert admission.admit(ip_address("2001:db8::1"), 0) is None
    assert admission.admit(ip_address("2001:db8::ffff:1"), 0) is not None
    assert admission.admit(ip_address("2001:db8:0:1::1"), 0) is None
    # The same number is not the same client.
    assert admission.admit(ip_address("10.0.0.1"), 0) is None
    assert admission.admit(ip_address(int(ip_address("10.0.0.1")) << 64 | 1 << 127), 0) is None


def test_an_idle_client_gets_its_burst_and_then_its_rate() -> None:
    admission = Admission(Limits(max_streams=0, new_streams_per_s=8))
    burst = int(8 * BURST_S)
    assert all(admission.admit(A, 100.0) is None for _ in range(burst))
    assert "new_streams_per_second" in str(admission.admit(A, 100.0))
    assert admission.admit(B, 100.0) is None
    assert admission.admit(A, 100.0625) is not None
    assert admission.admit(A, 100.125) is None
    assert admission.admit(A, 100.125) is not None
    assert all(admission.admit(A, 1000.0) is None for _ in range(burst))
    assert admission.admit(A, 1000.0) is not None


def test_a_refused_stream_uses_up_nothing() -> None:
    admission = Admission(Limits(max_streams=1, new_streams_per_s=1))
    assert admission.admit(A, 0) is None
    for _ in range(10):
        assert "max_streams" in str(admission.admit(A, 0))
    admission.leave(A)
    assert admission.admit(A, 0) is None


def test_only_so_many_clients_are_remembered_and_the_quietest_is_forgotten() -> None:
    admission = Admission(Limits(max_streams=0, new_streams_per_s=1), max_clients=3)
    clients = [ip_address(f"10.0.0.{n}") for n in range(5)]
    for client in clients:
        for _ in range(3):
            admission.admit(client, 0)
    assert len(admission._rates) == 3
    assert admission.admit(clients[4], 0) is not None
    assert admission.admit(clients[0], 0) is None


def test_leaving_forgets_a_client() -> None:
    admission = Admission(Limits())
    admission.admit(A, 0)
    admission.leave(A)
    assert not admission._streams
    with pytest.raises(KeyError):
        admission.leave(A)


def test_new_limits_hold_at_once() -> None:
    admission = Admission(Limits(max_streams=1, new_streams_per_s=0))
    admission.admit(A, 0)
    admission.limits = Limits(max_streams=2, new_streams_per_s=0)
    assert admission.admit(A, 0) is None


def test_bytes_are_held_by_all_together_and_given_back() -> None:
    budget = Budget(100)
    with budget.share() as one:
        assert one.take(60)
        with budget.share() as other:
            assert other.take(40)
            assert not other.take(1)
        assert budget.held == 60
        assert one.take(40)
    assert budget.held == 0
