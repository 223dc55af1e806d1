"""How records and leases are stored under etcd's keys, without an etcd."""

import base64
from typing import Any

import pytest

from discovery.model.mesh import Kind, NetworkSpec, Record, VipSpec
from discovery.store import Lease, UnknownLease
from discovery.store.etcd_keys import EtcdKeys, encode_lease, encode_spec, lease_id_of, lease_number

KEYS = EtcdKeys("/mesh/")
KEY = (Kind.VIP, "b", "v")
SPEC = VipSpec(name="orders.shop", address="10.200.0.1")
LEASE = Lease(id="2a", ttl_s=10, owner="somebody")


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_a_record_is_decoded_as_it_was_encoded() -> None:
    kv: dict[str, Any] = {"key": KEYS.record(KEY), "value": encode_spec(SPEC), "mod_revision": "7"}
    record: Record[VipSpec] = Record(kind=Kind.VIP, network="b", id="v", revision=7, spec=SPEC)
    assert KEYS.item(kv) == record
    assert KEYS.item(kv | {"lease": "42"}) == Record(
        kind=Kind.VIP, network="b", id="v", revision=7, lease="2a", spec=SPEC
    )
    assert KEYS.lease_or_record(kv) == KEY


def test_a_lease_is_decoded_as_it_was_encoded() -> None:
    kv = {"key": KEYS.lease(LEASE.id), "value": encode_lease(LEASE)}
    assert KEYS.item(kv) == LEASE
    assert KEYS.lease_or_record(kv) == LEASE.id


@pytest.mark.parametrize(
    ("key", "value", "logged"),
    [
        ("/mesh/epoch", "e", ""),
        ("/mesh/x", "{}", "not ours"),
        ("/mesh/records/vip/b", "{}", "not ours"),
        ("/mesh/records/other/b/v", "{}", "not ours"),
        ("/mesh/records/vip/B/v", "{}", "not ours"),
        ("/mesh/leases/x/y", "{}", "not ours"),
        ("/mesh/records/vip/b/v", "{", "cannot be read"),
        ("/mesh/records/vip/b/v", '{"unknown": 1}', "cannot be read"),
        ("/mesh/leases/2a", "[]", "cannot be read"),
    ],
)
def test_other_keys_and_values_are_skipped(caplog: pytest.LogCaptureFixture, key: str, value: str, logged: str) -> None:
    assert KEYS.item({"key": b64(key), "value": b64(value)}) is None
    assert [logged in record.message for record in caplog.records] == ([True] if logged else [])


def test_a_network_has_no_fields() -> None:
    kv = {"key": KEYS.record((Kind.NETWORK, "b", "b")), "value": encode_spec(NetworkSpec()), "mod_revision": "1"}
    found = KEYS.item(kv)
    assert isinstance(found, Record)
    assert found.spec == NetworkSpec()


def test_lease_ids_are_etcds_numbers() -> None:
    for number in (1, 42, (1 << 63) - 1):
        assert lease_number(lease_id_of(number)) == number
    for text in ("", "x", "0", "-1", f"{1 << 63:x}"):
        with pytest.raises(UnknownLease):
            lease_number(text)
