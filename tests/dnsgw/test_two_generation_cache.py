"""A bounded cache of recently used entries."""

from dnsgw.two_generation_cache import TwoGenerationCache


def test_it_keeps_recently_used_entries_and_at_most_twice_its_limit() -> None:
    recent: TwoGenerationCache[int] = TwoGenerationCache(4)
    recent[b"used"] = 0
    for n in range(100):
        recent[b"%d" % n] = n
        assert recent.get(b"used") == 0
        assert recent.get(b"%d" % n) == n
        assert len(recent) <= 8
    assert recent.get(b"0") is None
