"""Desired state: what to do next after any sequence of events."""

from discovery.client.desired_state import RETRY_REFUSED_S, Delete, DesiredState, Put
from discovery.model.mesh import Deletion, Kind, NetworkSpec

A = (Kind.NETWORK, "a", "a")
B = (Kind.NETWORK, "b", "b")


def put(key: tuple[Kind, str, str], leased: bool = True) -> Put:
    return Put(key, NetworkSpec(), leased)


def settled(state: DesiredState) -> DesiredState:
    while (work := state.next_work(0)) is not None:
        state.acknowledge(work, 1)
    assert state.settled
    return state


def test_the_life_of_a_wanted_record() -> None:
    state = DesiredState()
    assert state.settled
    assert state.publish(put(A))
    assert not state.publish(put(A))
    assert not state.settled
    assert state.next_work(0) == put(A)  # type: ignore[unreachable]
    state.acknowledge(put(A), 1)
    assert state.settled
    assert state.next_work(0) is None
    assert state.withdraw(A)
    assert not state.withdraw(A)
    assert state.next_work(0) == Delete(A, 1), "only as we wrote it"
    assert not state.settled
    state.acknowledge(Delete(A))
    assert state.settled
    assert state.next_retry() is None


def test_a_record_that_changed_during_its_write_is_written_again() -> None:
    state = DesiredState()
    state.publish(put(A))
    work = state.next_work(0)
    state.publish(put(A, leased=False))
    assert work is not None
    state.acknowledge(work, 1)
    assert state.next_work(0) == put(A, leased=False)


def test_a_record_may_be_published_again_while_it_is_deleted() -> None:
    state = settled_with(A)
    state.withdraw(A)
    state.publish(put(A))
    assert state.next_work(0) == put(A)
    state.acknowledge(Delete(A))
    assert not state.settled


def settled_with(*keys: tuple[Kind, str, str]) -> DesiredState:
    state = DesiredState()
    for key in keys:
        state.publish(put(key))
    return settled(state)


def test_a_refused_write_is_delayed_and_delays_no_other() -> None:
    state = DesiredState()
    state.publish(put(A))
    state.publish(put(B))
    assert state.refuse(put(A), 100)
    assert not state.refuse(put(A), 100)  # for the same reason: logged once
    assert state.refuse(put(A), 100, "another")
    assert state.next_work(100) == put(B)
    state.acknowledge(put(B), 1)
    assert state.next_work(100) is None
    assert state.next_retry() == 100 + RETRY_REFUSED_S
    assert state.next_work(100 + RETRY_REFUSED_S) == put(A)
    assert not state.settled
    state.withdraw(B)
    state.refuse(Delete(B), 200)
    state.refuse(Delete(A), 200)
    assert state.next_work(200) == put(A)
    # A changed record is tried at once, even if the previous one was refused.
    state.refuse(put(A), 200)
    state.publish(put(A, leased=False))
    assert state.next_work(200) == put(A, leased=False)


def test_a_lost_lease_affects_the_records_attached_to_it() -> None:
    state = settled_with(A)
    state.publish(put(B, leased=False))
    settled(state)
    state.lease_lost()
    assert state.next_work(0) == put(A)
    state.acknowledge(put(A), 2)
    assert state.settled


def test_after_a_change_of_epoch_everything_is_written_again() -> None:
    state = settled_with(A, B)
    state.withdraw(B)
    state.epoch_changed()
    assert state.next_work(0) == put(A)
    state.acknowledge(put(A), 1)
    assert state.settled  # the new store does not have B, so there is nothing to delete


def test_a_record_that_somebody_deleted_is_written_again() -> None:
    state = DesiredState()
    state.publish(put(A))
    assert not state.deleted(Deletion(A, 4))
    state.acknowledge(put(A), 5)
    assert not state.deleted(Deletion(A, 4))  # older than our write
    assert not state.deleted(Deletion(B, 6))
    assert state.deleted(Deletion(A, 6))
    assert state.next_work(0) == put(A)


def test_a_deletion_may_be_reported_before_the_write_is_answered() -> None:
    state = DesiredState()
    state.publish(put(A))
    assert not state.deleted(Deletion(A, 6))
    state.acknowledge(put(A), 5)
    assert state.next_work(0) == put(A)
    state.acknowledge(put(A), 3)  # after a change of epoch the old revision is used once, not forever
    assert state.settled


def claim(key: tuple[Kind, str, str]) -> Put:
    return Put(key, NetworkSpec(), leased=False, if_absent=True)


def test_an_if_absent_record_of_another_writer_counts_as_acknowledged() -> None:
    state = DesiredState()
    state.publish(claim(A))
    state.acknowledge(claim(A), 5, ours=False)
    assert state.settled
    assert state.deleted(Deletion(A, 6))  # now ours can be written
    assert state.next_work(0) == claim(A)
    state.acknowledge(claim(A), 7)
    assert state.withdraw(A)
    assert state.next_work(0) == Delete(A, if_match=7)


def test_an_if_absent_record_of_another_writer_is_not_deleted() -> None:
    state = DesiredState()
    for revision in (0, 5):
        state.publish(claim(A))
        if revision:
            state.acknowledge(claim(A), revision, ours=False)
        assert state.withdraw(A)
        assert state.settled
        assert state.next_work(0) is None
