"""In which order endpoints are tried, whatever has happened to them before."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from discovery.pacing.backoff import Backoff
from sniproxy.endpoints.health import TRIAL_S, Endpoint, EndpointHealth, LeftOut

A, B, C, D = ((f"10.0.0.{number}", 443) for number in range(1, 5))
ALL = (A, B, C, D)
FIRST_S, LONGEST_S = 2.0, 8.0


class Health(EndpointHealth):
    def __init__(self, max_tracked: int = 100) -> None:
        self.now = 1000.0
        super().__init__(lambda: self.now, ejection=Backoff(FIRST_S, LONGEST_S), max_tracked=max_tracked)

    def ordered(self, service: str = "s") -> list[Endpoint]:
        return list(self.order(service, ALL))

    def firsts(self, count: int, endpoints: tuple[Endpoint, ...] = ALL) -> list[Endpoint]:
        return [next(self.order("s", endpoints)) for _ in range(count)]


def test_all_come_first_in_turn() -> None:
    assert Health().firsts(8) == [A, B, C, D] * 2


def test_the_turns_of_services_are_their_own() -> None:
    health = Health()
    assert health.ordered("one")[0] == health.ordered("two")[0] == A


def test_nothing_is_lost_and_nothing_comes_twice() -> None:
    health = Health()
    health.failed(B, "refused")
    for _ in range(5):
        assert sorted(health.ordered()) == sorted(ALL)


def test_one_that_failed_comes_last_and_the_others_share_its_part() -> None:
    health = Health()
    assert health.failed(B, "refused") == LeftOut(failures=1, seconds=FIRST_S)
    orders = [health.ordered() for _ in range(30)]
    assert all(order[-1] == B for order in orders)
    assert Counter(order[0] for order in orders) == {A: 10, C: 10, D: 10}


def test_behind_the_first_come_those_that_have_answered() -> None:
    health = Health()
    health.succeeded(C)
    for _ in range(4):
        first, *others = health.ordered()
        assert first == C or others[0] == C


def test_one_that_failed_is_left_out_for_longer_each_time_up_to_a_longest_time() -> None:
    health = Health()
    for seconds in (2.0, 4.0, 8.0, 8.0):
        left_out = health.failed(A, "refused")
        assert left_out is not None
        assert left_out.seconds == seconds
        assert health.failed(A, "refused") is None  # a stream that had begun before
        health.now += seconds - 0.01
        assert health.left_out == 1
        health.now += 0.02
        assert health.left_out == 0


def test_after_its_time_one_stream_tries_it_and_the_others_go_on_without() -> None:
    health = Health()
    health.failed(A, "refused")
    health.now += FIRST_S
    firsts = health.firsts(8)
    assert firsts.count(A) == 1
    left_out = health.failed(A, "refused")
    assert left_out is not None
    assert left_out.failures == 2


def test_a_trial_that_ended_without_a_verdict_is_made_again() -> None:
    health = Health()
    health.failed(A, "refused")
    health.now += FIRST_S
    assert A in health.firsts(4)
    health.now += TRIAL_S
    assert A in health.firsts(4)


def test_one_that_answers_is_back_at_once() -> None:
    health = Health()
    health.failed(A, "refused")
    assert health.succeeded(A)
    assert not health.succeeded(A)
    assert set(health.firsts(4)) == set(ALL)
    left_out = health.failed(A, "refused")
    assert left_out is not None
    assert left_out.failures == 1


def test_where_all_are_left_out_all_are_tried_the_one_that_is_back_soonest_first() -> None:
    health = Health()
    for endpoint in (C, A, D, B):
        health.failed(endpoint, "refused")
        health.now += 0.1
    assert health.ordered() == [C, A, D, B]


def test_what_a_check_finds_counts_until_another_check_has_passed() -> None:
    health = Health()
    assert health.failed(A, "no TLS", next_check_s=10.0) == LeftOut(failures=1, seconds=30.0)
    health.now += 10
    assert health.failed(A, "no TLS", next_check_s=10.0) is None, "it is left out already, and stays so"
    assert not health.succeeded(A), "a connect says less than the check"
    assert health.left_out == 1
    assert health.succeeded(A, by_check=True)
    assert health.left_out == 0


def test_a_check_that_is_made_no_more_counts_no_more() -> None:
    health = Health()
    health.failed(A, "no TLS", next_check_s=10.0)
    health.now += 30
    assert health.left_out == 0
    assert health.succeeded(A)


def test_the_status_names_those_that_fail_the_worst_ones_first() -> None:
    health = Health()
    health.succeeded(A)
    health.failed(B, "refused")
    health.failed(("fd00::1", 443), "no answer in 3 s")
    health.now += FIRST_S
    health.failed(("fd00::1", 443), "no answer in 3 s")
    health.now += 1
    assert list(health.status(10)) == [
        {"endpoint": "[fd00::1]:443", "failures": 2, "left_out_s": 3.0, "why": "no answer in 3 s"},
        {"endpoint": "10.0.0.2:443", "failures": 1, "left_out_s": 0.0, "why": "refused"},
    ]
    assert len(list(health.status(1))) == 1


def test_memory_is_bounded() -> None:
    health = Health(max_tracked=3)
    for number in range(20):
        health.failed((f"10.0.1.{number}", 443), "refused")
        health.ordered(f"service-{number}")
    assert health.left_out == 3
    assert len(health._turns) == 3


@given(
    st.lists(
        st.tuples(st.sampled_from(ALL), st.sampled_from(["succeeded", "failed", "checked", "order"]), st.floats(0, 20))
    )
)
def test_whatever_happens_every_endpoint_is_tried_once(steps: list[tuple[Endpoint, str, float]]) -> None:
    health = Health(max_tracked=2)
    for endpoint, step, seconds in steps:
        if step == "succeeded":
            health.succeeded(endpoint)
        elif step == "order":
            assert sorted(health.ordered()) == sorted(ALL)
        else:
            health.failed(endpoint, "refused", next_check_s=5.0 if step == "checked" else None)
        health.now += seconds
        assert sorted(health.ordered()) == sorted(ALL)
