"""Backoff: pauses grow up to a limit, and are random."""

import pytest

from discovery.pacing.backoff import Backoff


@pytest.mark.parametrize(("failures", "bound_s"), [(0, 1.0), (1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (10**9, 10.0)])
def test_pauses_double_up_to_the_limit(failures: int, bound_s: float) -> None:
    assert Backoff(1.0, 10.0).bound_s(failures) == bound_s


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_a_pause_is_within_its_bounds(jitter: float) -> None:
    drawn = [Backoff(1.0, 10.0, jitter).pause_s(3) for _ in range(200)]
    assert 4.0 * (1 - jitter) <= min(drawn) <= max(drawn) <= 4.0
    assert (len(set(drawn)) > 1) is (jitter > 0)
