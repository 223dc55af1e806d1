"""How many binds at once: few if they slow each other down, many if they only wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnreg.client.bind_concurrency import INITIAL_CONCURRENCY, MIN_CONCURRENCY, BindConcurrency


@given(st.integers(1, 200), st.lists(st.floats(0, 10), max_size=300))
def test_it_stays_within_its_bounds(most: int, times: list[float]) -> None:
    window = BindConcurrency(most)
    assert window.size == min(INITIAL_CONCURRENCY, most)
    for seconds in times:
        window.took(seconds)
        assert min(MIN_CONCURRENCY, most) <= window.size <= most


@pytest.mark.parametrize("round_trips_s", [0.001, 0.4, 2.0])
def test_binds_that_only_wait_are_let_through_wherever_the_server_is(round_trips_s: float) -> None:
    window = BindConcurrency(128)
    for _ in range(128 - INITIAL_CONCURRENCY):
        window.took(round_trips_s * 1.1)
    assert window.size == 128


def test_binds_that_share_a_busy_processor_go_in_small_groups() -> None:
    """Each costs 25 ms of it: the more are under way, the longer each takes."""
    window = BindConcurrency(128)
    window.took(0.03)  # one before the crowd came
    for _ in range(200):
        window.took(window.size * 0.025)
    assert window.size < INITIAL_CONCURRENCY


def test_a_path_that_has_become_longer_is_learnt() -> None:
    window = BindConcurrency(128)
    window.took(0.01)
    for _ in range(1000):
        window.took(0.8)
    assert window.size == 128
