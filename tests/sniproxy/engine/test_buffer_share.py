"""Shares of slow and fast streams, by a clock of the test."""

from sniproxy.engine.buffer_share import MIN_BUFFER_BYTES, BufferShare

MIB = 1024 * 1024


def never() -> bool:
    return False


def always() -> bool:
    return True


def fast(share: BufferShare, moved: int, seconds: float, began: float = 0.0) -> None:
    """Move so many bytes evenly."""
    steps = 100
    for step in range(1, steps + 1):
        share.update(moved * step // steps, began + seconds * step / steps, 0.0, always)


def test_it_begins_small() -> None:
    share = BufferShare(MIB, 65536, 0.0)
    assert share.is_small
    assert share.share == MIB // 4


def test_no_buffer_is_too_small_for_an_upload_that_waits() -> None:
    assert BufferShare(1, 0, 0.0).share == MIN_BUFFER_BYTES // 4


def test_a_stream_earns_a_large_share_by_what_it_moves() -> None:
    share = BufferShare(MIB, 0, 0.0)
    share.update(2 * MIB - 1, 0.01, 0.0, always)
    assert share.is_small
    share.update(2 * MIB, 0.01, 0.0, always)
    assert share.share == MIB // 2
    share.update(4 * MIB, 0.02, 0.0, always)
    assert share.share is None


def test_a_stream_at_five_megabytes_per_second_is_slow() -> None:
    share = BufferShare(MIB, 0, 0.0)
    fast(share, 40_000_000, 10.0)
    assert share.is_small


def test_a_reader_that_takes_nothing_for_long_is_slow_again() -> None:
    share = BufferShare(MIB, 0, 0.0)
    fast(share, 100 * MIB, 1.0)
    assert share.share is None
    share.update(101 * MIB, 1.7, 0.6, always)
    assert share.is_small
    share.update(102 * MIB, 1.8, 0.0, always)
    assert share.is_small, "what it moved before does not count"
    share.update(105 * MIB, 1.9, 0.0, always)
    assert share.share is None


def test_a_look_at_a_stream_that_does_not_move_makes_it_slow() -> None:
    share = BufferShare(MIB, 0, 0.0)
    fast(share, 100 * MIB, 1.0)
    share.update(100 * MIB, 6.0, 0.0, always)
    assert share.is_small


def test_no_more_large_shares_than_there_are() -> None:
    share = BufferShare(MIB, 0, 0.0)
    asked = []

    def may_be_fast() -> bool:
        asked.append(True)
        return len(asked) > 1

    for step in range(1, 40):
        share.update(step * MIB, step / 100, 0.0, may_be_fast)
    assert share.share == MIB // 2
    assert len(asked) == 1, "it does not ask for every move"
    share.update(60 * MIB, 0.6, 0.0, may_be_fast)
    assert share.share is None


def test_time_that_stands_still_changes_nothing() -> None:
    share = BufferShare(MIB, 0, 5.0)
    for _ in range(3):
        share.update(0, 5.0, 0.0, never)
    assert share.is_small
