"""A flood does not block a process: real processes and real clients, as in `python -m bench.fair`.

No durations are asserted. A client that waits for five seconds, or a signal without effect, counts as blocked.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import fair
from bench.fair import FLOODS, measure
from bench.fairness import LIMIT_S

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service() -> Iterator[int]:
    with fair.serving() as port:
        yield port


@pytest.mark.parametrize(
    ("flood", "attackers"),
    [
        ("stun-bindings", 1),
        ("stun-indications", 8),
        ("tls-bindings", 1),
        ("udp-bindings", 2),
        ("relay-empty", 1),
        ("relay-one-byte", 8),
        ("relay-received", 1),
        ("gateway-empty", 1),
        ("gateway-unknown", 8),
        ("warm-ping", 1),
    ],
)
def test_other_clients_are_served_and_signals_are_handled(
    flood: str, attackers: int, service: int, tmp_path: Path
) -> None:
    result = measure(flood, attackers, 0.5, tmp_path, service, first=False)
    for victim in FLOODS[flood]:
        assert result[victim]["tries"] > 1
        assert result[victim]["p99_ms"] < LIMIT_S * 1000, result
    assert result["sigterm_s"] is not None
