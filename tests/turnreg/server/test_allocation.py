"""The state of the server: permissions, quotas, waiting peers."""

import itertools
from collections.abc import Callable

from turnreg.server.allocation import Allocation, AllocationTable, Attempt, FiveTuple, Limits, Refusal

PEER = ("10.0.0.9", 40_000)
CLIENT_PORTS = itertools.count(1)


def draws() -> Callable[[int], bytes]:
    counter = itertools.count(1)
    return lambda size: next(counter).to_bytes(size, "big")


def table(**limits: float) -> AllocationTable:
    return AllocationTable(Limits(**limits), draws())  # type: ignore[arg-type]


def add(to: AllocationTable, account: str = "u", *, expires_at: float = 600.0) -> Allocation:
    assert to.reserve(account) is None
    allocation = Allocation(
        five_tuple=FiveTuple(("192.0.2.1", next(CLIENT_PORTS)), ("192.0.2.2", 3478)),
        account=account,
        relayed=("192.0.2.2", 50_000),
        transaction_id=b"t" * 12,
        lifetime_s=expires_at,
        expires_at=expires_at,
        family=1,
    )
    to.add(allocation)
    return allocation


def announce(to: AllocationTable, allocation: Allocation, peer: tuple[str, int] = PEER) -> Attempt:
    allocation.permit([peer[0]], 300.0, 10, 0.0)
    announced = to.announce(allocation, peer, 0.0)
    assert not isinstance(announced, Refusal)
    return announced[0]


class TestPermissions:
    def test_by_address_and_for_their_time(self) -> None:
        allocation = add(table())
        assert not allocation.permits("10.0.0.9", 0.0)
        assert allocation.permit(["10.0.0.9", "10.0.0.10"], 300.0, 10, now=0.0)
        assert allocation.permits("10.0.0.9", 299.9)
        assert allocation.permits("10.0.0.10", 299.9)
        assert not allocation.permits("10.0.0.9", 300.0)
        assert not allocation.permits("10.0.0.11", 1.0)

    def test_are_renewed(self) -> None:
        allocation = add(table())
        allocation.permit(["10.0.0.9"], 300.0, 10, now=0.0)
        allocation.permit(["10.0.0.9"], 300.0, 10, now=240.0)
        assert allocation.permits("10.0.0.9", 539.0)

    def test_all_or_none_up_to_the_limit(self) -> None:
        allocation = add(table())
        assert allocation.permit(["10.0.0.1", "10.0.0.2"], 300.0, 2, now=0.0)
        assert not allocation.permit(["10.0.0.2", "10.0.0.3"], 300.0, 2, now=200.0)
        assert not allocation.permits("10.0.0.2", 300.0)  # not renewed either
        assert allocation.permit(["10.0.0.2"], 300.0, 2, now=200.0)
        assert allocation.permit(["10.0.0.3"], 300.0, 2, now=300.0)  # 10.0.0.1 has ended and makes room
        assert len(allocation.permissions) == 2


class TestQuota:
    def test_per_account_and_in_all(self) -> None:
        places = table(max_allocations_per_account=2, max_allocations=3)
        first = add(places)
        add(places)
        assert places.reserve("u") is Refusal.QUOTA
        add(places, "v")
        assert places.reserve("w") is Refusal.CAPACITY
        places.remove(first)
        places.remove(first)
        assert len(places) == 2
        assert places.reserve("u") is None
        assert places.reserve("u") is Refusal.QUOTA

    def test_a_place_that_was_reserved_counts_until_it_is_given_up(self) -> None:
        places = table(max_allocations_per_account=1)
        assert places.reserve("u") is None
        assert places.reserve("u") is Refusal.QUOTA
        places.give_up("u")
        assert places.reserve("u") is None


class TestLife:
    def test_found_by_its_connection_while_it_lives(self) -> None:
        places = table()
        allocation = add(places)
        assert places.find(allocation.five_tuple, 599.0) is allocation
        assert places.find(allocation.five_tuple, 600.0) is None
        allocation.refresh(600.0, 599.0)
        assert places.find(allocation.five_tuple, 1198.0) is allocation
        other = FiveTuple(allocation.five_tuple.client, ("192.0.2.2", 3479))
        assert places.find(other, 0.0) is None
        assert list(places) == [allocation]


class TestShares:
    def test_no_account_takes_more_than_its_share_of_the_ports(self) -> None:
        places = table(max_ports_per_account=2)
        allocation = add(places, "b")
        add(places, "b")
        assert places.reserve("b") is Refusal.PORT_SHARE
        add(places, "c")
        assert places.largest_account == 2
        places.remove(allocation)
        assert places.reserve("b") is None
        places.limits = Limits(max_ports_per_account=3)
        assert places.reserve("b") is None
        assert places.reserve("b") is Refusal.PORT_SHARE
        places.limits = Limits()
        assert places.reserve("b") is None


class TestPeers:
    def test_without_permission(self) -> None:
        places = table()
        assert places.announce(add(places), PEER, 0.0) is Refusal.PEER_NOT_PERMITTED

    def test_claimed_once(self) -> None:
        places = table()
        allocation = add(places)
        attempt = announce(places, allocation)
        assert (attempt.peer, attempt.allocation) == (PEER, allocation)
        assert places.waiting == len(allocation.waiting) == 1
        assert places.claim(attempt.connection_id, "u") is attempt
        assert places.claim(attempt.connection_id, "u") is Refusal.UNKNOWN_CONNECTION
        assert places.waiting == len(allocation.waiting) == 0
        assert not places.release(attempt)

    def test_a_failed_claim_leaves_it_waiting(self) -> None:
        places = table()
        attempt = announce(places, add(places))
        assert places.claim(attempt.connection_id, "v") is Refusal.WRONG_USER
        assert places.claim(None, "u") is Refusal.UNKNOWN_CONNECTION
        assert places.claim(b"", "u") is Refusal.UNKNOWN_CONNECTION
        assert places.claim(b"\0\0\0\0", "u") is Refusal.UNKNOWN_CONNECTION
        assert places.claim(attempt.connection_id, "u") is attempt

    def test_many_from_one_address_in_any_order(self) -> None:
        places = table()
        allocation = add(places)
        attempts = [announce(places, allocation, ("10.0.0.9", port)) for port in range(300)]
        assert len({attempt.connection_id for attempt in attempts}) == 300
        assert all(len(attempt.connection_id) == 4 for attempt in attempts)
        for attempt in reversed(attempts):
            assert places.claim(attempt.connection_id, "u") is attempt

    def test_an_id_in_use_is_not_given_again(self) -> None:
        numbers = iter([7, 7, 7, 8])
        places = AllocationTable(Limits(), lambda size: next(numbers).to_bytes(size, "big"))
        allocation = add(places)
        assert announce(places, allocation).connection_id == b"\0\0\0\7"
        assert announce(places, allocation).connection_id == b"\0\0\0\x08"

    def test_the_oldest_goes_when_too_many_wait(self) -> None:
        places = table(max_unbound_per_allocation=2)
        allocation, other = add(places), add(places)
        first, second = announce(places, allocation), announce(places, allocation)
        announce(places, other)
        announced = places.announce(allocation, PEER, 0.0)
        assert not isinstance(announced, Refusal)
        assert announced[1] is first
        assert places.claim(first.connection_id, "u") is Refusal.UNKNOWN_CONNECTION
        assert places.claim(second.connection_id, "u") is second
        announced = places.announce(allocation, PEER, 0.0)
        assert not isinstance(announced, Refusal)
        assert announced[1] is None
        assert places.announce(allocation, ("10.0.0.66", 1), 0.0) is Refusal.PEER_NOT_PERMITTED
        assert len(allocation.waiting) == 2

    def test_bounded_in_all_per_account(self) -> None:
        places = table(max_connections_per_account=2)
        allocation, other = add(places), add(places)
        for number in (1, 2):
            attempt = announce(places, allocation, ("10.0.0.9", number))
            assert places.claim(attempt.connection_id, "u") is attempt
        assert places.announce(other, PEER, 0.0) is Refusal.PEER_NOT_PERMITTED
        other.permit([PEER[0]], 300.0, 10, 0.0)
        assert places.announce(other, PEER, 0.0) is Refusal.PEER_LIMIT
        announce(places, add(places, "v"))
        places.depart(allocation, PEER)
        announce(places, other)

    def test_go_with_their_allocation(self) -> None:
        places = table()
        allocation = add(places)
        attempt = announce(places, allocation)
        kept = announce(places, add(places))
        places.remove(allocation)
        assert places.claim(attempt.connection_id, "u") is Refusal.UNKNOWN_CONNECTION
        assert places.claim(kept.connection_id, "u") is kept


class TestAllThatWait:
    def test_one_of_the_same_allocation_goes_when_there_are_too_many(self) -> None:
        places = table(max_unbound=2)
        first, second, third = add(places), add(places), add(places)
        oldest = announce(places, first)
        announce(places, second)
        third.permit([PEER[0]], 300.0, 10, 0.0)
        assert places.announce(third, PEER, 0.0) is Refusal.PEER_LIMIT
        announced = places.announce(first, ("10.0.0.9", 40_001), 0.0)
        assert not isinstance(announced, Refusal)
        assert announced[1] is oldest
        assert places.waiting == 2


class TestChannels:
    LIMITS = Limits(max_channels=2)
    OTHER = ("10.0.0.9", 40_001)

    def test_lead_to_a_peer_and_back_for_their_time(self) -> None:
        allocation = add(table())
        assert allocation.bind_channel(0x4000, PEER, self.LIMITS, 0.0) is None
        assert allocation.peer_of(0x4000, 599.9) == PEER
        assert allocation.channel_to(PEER, 599.9) == 0x4000
        assert allocation.peer_of(0x4000, 600.0) is None
        assert allocation.channel_to(PEER, 600.0) is None
        assert allocation.permits(PEER[0], 299.9)
        assert not allocation.permits(PEER[0], 300.0)

    def test_are_renewed(self) -> None:
        allocation = add(table())
        allocation.bind_channel(0x4000, PEER, self.LIMITS, 0.0)
        assert allocation.bind_channel(0x4000, PEER, self.LIMITS, 500.0) is None
        assert allocation.peer_of(0x4000, 1000.0) == PEER

    def test_a_number_has_one_peer_and_a_peer_one_number(self) -> None:
        allocation = add(table())
        allocation.bind_channel(0x4000, PEER, self.LIMITS, 0.0)
        assert allocation.bind_channel(0x4000, self.OTHER, self.LIMITS, 1.0) is Refusal.BAD_REQUEST
        assert allocation.bind_channel(0x4001, PEER, self.LIMITS, 1.0) is Refusal.BAD_REQUEST
        assert allocation.bind_channel(0x4001, self.OTHER, self.LIMITS, 1.0) is None
        assert allocation.bind_channel(0x4000, self.OTHER, self.LIMITS, 700.0) is None

    def test_are_bounded(self) -> None:
        allocation = add(table())
        for number in range(2):
            assert allocation.bind_channel(0x4000 + number, ("10.0.0.9", 1 + number), self.LIMITS, 0.0) is None
        assert allocation.bind_channel(0x4002, ("10.0.0.9", 9), self.LIMITS, 1.0) is Refusal.CAPACITY
        assert allocation.bind_channel(0x4001, ("10.0.0.9", 2), self.LIMITS, 1.0) is None
        assert allocation.bind_channel(0x4002, ("10.0.0.9", 9), self.LIMITS, 602.0) is None


class TestActiveConnects:
    def test_one_connection_to_a_peer(self) -> None:
        places = table()
        allocation = add(places)
        assert places.connect(allocation, PEER) is None
        assert places.connect(allocation, PEER) is Refusal.CONNECTION_EXISTS
        places.depart(allocation, PEER)
        assert places.connect(allocation, PEER) is None

    def test_none_to_a_peer_that_came_by_itself(self) -> None:
        places = table()
        allocation = add(places)
        announce(places, allocation)
        assert places.connect(allocation, PEER) is Refusal.CONNECTION_EXISTS

    def test_few_at_a_time(self) -> None:
        places = table(max_connects_per_allocation=1)
        allocation = add(places)
        assert places.connect(allocation, PEER) is None
        assert places.connect(allocation, ("10.0.0.9", 1)) is Refusal.CAPACITY

    def test_they_count_as_connections(self) -> None:
        places = table(max_connections_per_account=1)
        allocation = add(places)
        assert places.connect(allocation, PEER) is None
        assert places.connect(allocation, ("10.0.0.9", 1)) is Refusal.CAPACITY


def test_a_server_that_drains_takes_no_allocation() -> None:
    places = table()
    add(places)
    places.draining = True
    assert places.reserve("u") is Refusal.DRAINING
    assert len(places) == 1
