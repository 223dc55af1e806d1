"""Verification: preambles for this very process, up to the share of their network, and what a refused relay is told."""

import dataclasses
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.epoch import told_epoch
from sniproxy.tunnel.preamble import Preamble, PreambleError, SigningKey, sign
from sniproxy.tunnel.verify import (
    MIN_SHARE,
    REPLAY_WINDOW_MS,
    TIME_WINDOW_MS,
    PreambleVerifier,
    ReplayCache,
    check_hello,
    share_of,
)

NOW_MS = 1_800_000_000_000
AB = SigningKey(id="ab-1", secret=bytes(range(32)), from_network="a", to_network="b")
CB = SigningKey(id="cb-1", secret=bytes(range(1, 33)), from_network="c", to_network="b")
KEYS = {key.id: key for key in (AB, CB)}
EPOCH = bytes(range(100, 116))

GOOD = Preamble(
    client=("10.9.8.7", 54321),
    local=("10.0.0.9", 443),
    authority="orders.shop.example",
    stream_id=bytes(16),
    from_network="a",
    to_network="b",
    addressee="gw-1",
    key_id="ab-1",
    time_ms=NOW_MS,
    target="10.1.0.5:8443",
    hello_digest=bytes(32),
    epoch=EPOCH,
)


def verify(by: PreambleVerifier, key: SigningKey = AB, now_ms: int = NOW_MS, **changes: object) -> Preamble:
    preamble = dataclasses.replace(GOOD, stream_id=os.urandom(16), **changes)  # type: ignore[arg-type]
    verified = by.verify(sign(preamble, key.secret), addressee="gw-1", now_ms=now_ms)
    assert isinstance(verified, Preamble)
    return verified


def refused(by: PreambleVerifier, key: SigningKey = AB, now_ms: int = NOW_MS, **changes: object) -> PreambleError:
    with pytest.raises(PreambleError) as raised:
        verify(by, key, now_ms, **changes)
    return raised.value


def test_the_epoch_must_be_that_of_this_process() -> None:
    verifier = PreambleVerifier(KEYS, "b", epoch=EPOCH)
    assert verify(verifier).epoch == EPOCH
    for other in (bytes(16), bytes(range(16))):
        preamble = dataclasses.replace(GOOD, epoch=other)
        with pytest.raises(PreambleError) as raised:
            verifier.verify(sign(preamble, AB.secret), addressee="gw-1", now_ms=NOW_MS)
        error = raised.value
        assert error.reason is error.told[0] is Reason.STALE_EPOCH
        assert told_epoch(error.told[1], AB.secret, preamble.once) == EPOCH
    assert len(verifier.replays) == 1, "what is refused is not remembered"


def test_relays_from_before_epochs_come_in_unless_told_otherwise() -> None:
    verifier = PreambleVerifier(KEYS, "b", epoch=EPOCH)
    assert verify(verifier, epoch=None).epoch is None
    verifier.require_epoch = True
    assert refused(verifier, epoch=None).reason is Reason.STALE_EPOCH
    assert verify(verifier).epoch == EPOCH


def test_an_unknown_key_and_a_bad_signature_get_the_same_answer() -> None:
    verifier = PreambleVerifier(KEYS, "b", epoch=EPOCH)
    errors = [refused(verifier, key_id="zz-1"), refused(verifier, key=CB), refused(verifier, from_network="c")]
    assert [error.reason for error in errors] == [Reason.NO_KEY, Reason.BAD_SIGNATURE, Reason.NO_KEY]
    assert len({error.told for error in errors}) == 1
    assert errors[0].told[0] is Reason.BAD_SIGNATURE
    assert len({error.detail for error in errors}) == 3, "our own log tells them apart"


def test_only_holders_of_a_key_learn_our_clock() -> None:
    verifier = PreambleVerifier(KEYS, "b", epoch=EPOCH)
    late = refused(verifier, now_ms=NOW_MS + 90_500)
    assert late.reason is late.told[0] is Reason.CLOCK_SKEW
    assert "90.5 s behind" in late.told[1]
    assert "ahead of" in refused(verifier, now_ms=NOW_MS - 90_500).detail
    stranger = refused(verifier, key=CB, now_ms=NOW_MS + 90_500)
    assert stranger.told[0] is Reason.BAD_SIGNATURE
    assert "90.5" not in stranger.told[1]


def test_one_network_cannot_fill_the_memory_of_all() -> None:
    verifier = PreambleVerifier(KEYS, "b", ReplayCache(max_entries=10), epoch=EPOCH)
    for _ in range(5):
        verify(verifier)
    full = refused(verifier)
    assert full.reason is Reason.OVERLOADED
    assert "network 'a'" in full.detail
    for _ in range(5):
        verify(verifier, key=CB, key_id="cb-1", from_network="c")
    assert refused(verifier, key=CB, key_id="cb-1", from_network="c").reason is Reason.OVERLOADED
    assert (len(verifier.replays), verifier.replays.largest()) == (10, 5)
    # Two minutes later all of it has been forgotten, and each has its share again.
    later = NOW_MS + verifier.replays.window_ms + 1
    verify(verifier, now_ms=later, time_ms=later)
    assert (len(verifier.replays), verifier.replays.largest()) == (1, 1)


def test_shares() -> None:
    assert share_of(100, 0) == share_of(100, 1) == 100
    assert share_of(100, 2) == 50
    assert share_of(1600, 1000) == 1600 // MIN_SHARE
    assert share_of(1, 1000) == 1


def test_added_and_removed_keys_change_the_shares() -> None:
    verifier = PreambleVerifier({"ab-1": AB}, "b")
    assert verifier.networks == 1
    verifier.keys = {
        **KEYS,
        "ab-2": dataclasses.replace(AB, id="ab-2"),
        "bc": dataclasses.replace(AB, from_network="b", to_network="c"),
    }
    assert verifier.networks == 2


# --- the hello ------------------------------------------------------------------------------------------------------


def test_the_hello_must_be_the_one_that_was_signed_for() -> None:
    assert GOOD.hello_digest is not None
    check_hello(GOOD, "orders.shop.example", GOOD.hello_digest)
    for name, digest, preamble in (
        ("orders.shop.example", bytes(range(32)), GOOD),
        ("other.shop.example", GOOD.hello_digest, GOOD),
        ("orders.shop.example", GOOD.hello_digest, dataclasses.replace(GOOD, hello_digest=None)),
    ):
        with pytest.raises(PreambleError) as refused:
            check_hello(preamble, name, digest)
        assert refused.value.reason is Reason.BAD_SIGNATURE


# --- the replay cache -----------------------------------------------------------------------------------------------


def raised(call: Callable[[], None]) -> Reason | None:
    try:
        call()
    except PreambleError as error:
        return error.reason
    return None


def test_a_full_cache_refuses_and_forgets_nothing() -> None:
    cache = ReplayCache(max_entries=3, window_ms=100)
    for at in range(3):
        cache.add(bytes([at]), at)
    assert raised(lambda: cache.add(b"x", 100)) is Reason.OVERLOADED
    assert raised(lambda: cache.add(b"\0", 100)) is Reason.REPLAY
    assert raised(lambda: cache.add(b"x", 101)) is None  # the first is more than 100 ms old now
    assert raised(lambda: cache.add(b"y", 101)) is Reason.OVERLOADED
    assert len(cache) == 3


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(-20, 60)), max_size=40))
def test_nothing_passes_twice_within_the_window(arrivals: list[tuple[int, int]]) -> None:
    """Whatever the clock does meanwhile, an id that passed is refused until the clock has been 100 ms beyond it."""
    cache = ReplayCache(max_entries=5, window_ms=100)
    passed: dict[int, int] = {}
    now = latest = 1000
    for number, step in arrivals:
        now += step
        latest = max(latest, now)
        if raised(lambda seen=bytes([number]), now=now: cache.add(seen, now)) is None:  # type: ignore[misc]
            assert number not in passed or latest > passed[number] + 100
            passed[number] = now
        assert len(cache) <= 5


def test_the_window_covers_every_fresh_header() -> None:
    assert REPLAY_WINDOW_MS >= 2 * TIME_WINDOW_MS
