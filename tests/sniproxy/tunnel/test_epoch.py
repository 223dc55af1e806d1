"""Epochs in records and refusals: read exactly as written, and never believed without proof."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.spec import FRAMED, GatewaySpec, Kind, spec_faults
from sniproxy.tunnel.epoch import EPOCH_SIZE, UNKNOWN_EPOCH, epoch_in, proto_of, stale_detail, told_epoch
from sniproxy.tunnel.messages import MAX_DETAIL

KEY = bytes(range(32))
EPOCHS = st.binary(min_size=EPOCH_SIZE, max_size=EPOCH_SIZE)


@given(EPOCHS)
def test_a_record_contains_the_epoch(epoch: bytes) -> None:
    assert epoch_in([FRAMED, proto_of(epoch)]) == epoch
    assert epoch_in([proto_of(epoch), FRAMED, "framed/2"]) == epoch


@given(EPOCHS)
def test_discovery_servers_from_before_epochs_take_such_a_record(epoch: bytes) -> None:
    """To older versions it is just an entry of `proto`, of which there may be sixteen of this form."""
    spec = GatewaySpec(address="10.0.0.9:7443", proto=[FRAMED, proto_of(epoch)])
    assert not list(spec_faults(Kind.GATEWAY, "gw-1", spec))


@pytest.mark.parametrize(
    "proto",
    [[], [FRAMED], ["epoch-/1"], ["epoch-aaaa/1"], ["epoch-" + "1" * 26 + "/1"], [proto_of(bytes(16))[:-1] + "2"]],
)
def test_what_is_no_epoch_is_skipped(proto: list[str]) -> None:
    assert epoch_in(proto) is None


@given(EPOCHS, st.binary(max_size=100))
def test_a_refusal_tells_the_epoch_under_the_key(epoch: bytes, once: bytes) -> None:
    detail = stale_detail(epoch, KEY, once)
    assert len(detail) <= MAX_DETAIL
    assert told_epoch(detail, KEY, once) == epoch
    assert told_epoch(detail, bytes(32), once) is None, "another key"
    assert told_epoch(detail, KEY, once + b"x") is None, "the refusal of another stream"


@given(EPOCHS, st.integers(0, 90), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567 0é"))
def test_no_other_text_contains_an_epoch(epoch: bytes, at: int, letter: str) -> None:
    detail = stale_detail(epoch, KEY, b"once")
    changed = detail[:at] + letter + detail[at + 1 :]
    # The last letter of an epoch has two bits to spare: another spelling of the same bytes tells the same.
    assert told_epoch(changed, KEY, b"once") in (None, epoch)


@given(st.text(max_size=200))
def test_garbage_contains_no_epoch(text: str) -> None:
    assert told_epoch(text, KEY, b"once") is None


def test_no_process_has_the_unknown_epoch() -> None:
    assert os.urandom(EPOCH_SIZE) != UNKNOWN_EPOCH
