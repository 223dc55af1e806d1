"""Records and the mesh: decoding, indexes, and changes that do not affect the old mesh."""

from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.mesh import (
    AllocationSpec,
    AnyRecord,
    BadRecord,
    Deletion,
    GatewaySpec,
    Kind,
    Mesh,
    NetworkSpec,
    Record,
    RelaySpec,
    ServiceSpec,
    TurnSpec,
    VipSpec,
    decode_record,
)


def service(network: str, name: str, record_id: str | None = None, revision: int = 1) -> Record[ServiceSpec]:
    spec = ServiceSpec(name=name, ports={"8443": []})
    return Record(kind=Kind.SERVICE, network=network, id=record_id or name, revision=revision, spec=spec)


def network(name: str, revision: int = 1) -> Record[NetworkSpec]:
    return Record(kind=Kind.NETWORK, network=name, id=name, revision=revision, spec=NetworkSpec())


def names(records: Iterable[Record[ServiceSpec]]) -> list[str]:
    return [record.spec.name for record in records]


def member(name: str, of: str) -> Record[ServiceSpec]:
    found = service("b", name)
    return msgspec.structs.replace(found, spec=msgspec.structs.replace(found.spec, member_of=of))


def test_members_are_found_by_their_service() -> None:
    mesh = Mesh.of(
        [service("b", "db.x"), member("db-1.db.x", "db.x"), member("db-0.db.x", "db.x"), service("b", "a.db.x")]
    )
    assert names(mesh.members("b", "db.x")) == ["db-0.db.x", "db-1.db.x"]
    assert mesh.members("b", "db-0.db.x") == mesh.members("c", "db.x") == ()


def test_a_beginning_stands_for_a_service_and_not_for_its_aliases() -> None:
    alias = service("b", "orders.shop.svc.clusterset.local")
    spec = msgspec.structs.replace(alias.spec, alias_of="orders.shop.svc.cluster.local")
    alias = msgspec.structs.replace(alias, spec=spec)
    both = [service("b", "orders.shop.svc.cluster.local"), alias]
    assert names(Mesh.of(both).services_beginning("b", "orders.shop")) == ["orders.shop.svc.cluster.local"]
    assert names(Mesh.of([alias]).services_beginning("b", "orders.shop")) == ["orders.shop.svc.clusterset.local"]
    other = service("b", "orders.shop.svc.other")
    assert len(Mesh.of([*both, other]).services_beginning("b", "orders.shop")) == 2
    assert names(Mesh.of(both).services_beginning("b", alias.spec.name)) == [alias.spec.name]


def test_records_are_found_by_kind_and_network() -> None:
    relay = Record(kind=Kind.RELAY, network="a", id="r", revision=1, spec=RelaySpec(addresses=["10.0.0.9"], ports=[1]))
    turn = Record(
        kind=Kind.TURN,
        network="a",
        id="t",
        revision=2,
        spec=TurnSpec(url="turn:10.0.0.7", relay_addresses=["10.0.0.7"], port_min=1, port_max=2),
    )
    allocation = Record(
        kind=Kind.ALLOCATION,
        network="b",
        id="x",
        revision=3,
        spec=AllocationSpec(via="z", turn="t", port=1, gateway="g"),
    )
    gateway = Record(kind=Kind.GATEWAY, network="b", id="g", revision=4, spec=GatewaySpec(address="10.9.0.1:1"))
    vip = Record(kind=Kind.VIP, network="a", id="v", revision=5, spec=VipSpec(name="o.s", address="10.200.0.1"))
    mesh = Mesh.of([vip, relay, turn, allocation, gateway, service("b", "o.s"), network("c")])
    assert mesh.relays("a") == (relay,)
    assert mesh.turns("a") == (turn,)
    assert mesh.allocations("b") == (allocation,)
    assert mesh.gateways("b") == (gateway,)
    assert mesh.vips("a") == (vip,)
    assert names(mesh.services("b")) == ["o.s"]
    assert mesh.relays("b") == ()
    assert mesh.networks == {"a", "b", "c", "z"}
    assert mesh.revision == 5
    assert len(mesh) == len(list(mesh)) == 7
    assert mesh.record(Kind.VIP, "a", "v") is vip
    assert mesh.record(Kind.VIP, "b", "v") is None
    assert "7 records" in repr(mesh)


def test_services_are_found_by_name_and_prefix() -> None:
    mesh = Mesh.of(
        service("b", name)
        for name in ("orders.shop", "orders.shop.svc", "orders.shop-x.svc", "orders.shops", "a.b", "orders.shop.a.b")
    )
    assert names(mesh.services_beginning("b", "orders.shop")) == ["orders.shop", "orders.shop.a.b", "orders.shop.svc"]
    assert names(mesh.services_beginning("b", "orders.shop.s")) == []
    assert names(mesh.services_beginning("b", "a.b")) == ["a.b"]
    assert names(mesh.services_beginning("c", "a.b")) == []
    found = mesh.service("b", "orders.shop")
    assert found is not None
    assert found.id == "orders.shop"
    assert mesh.service("b", "orders") is None


def test_of_two_records_with_one_name_the_first_id_is_used() -> None:
    for order in (1, -1):
        mesh = Mesh.of([service("b", "o.s", "2"), service("b", "o.s", "1")][::order])
        found = mesh.service("b", "o.s")
        assert found is not None
        assert found.id == "1"
        assert len(mesh.services_beginning("b", "o.s")) == 1


def test_applying_changes_keeps_the_old_mesh_and_shares_the_rest() -> None:
    before = Mesh.of([service("b", "o.s"), service("c", "o.s"), network("b")])
    after = before.apply([Deletion((Kind.SERVICE, "b", "o.s"), 7), service("c", "x.y", revision=6)])
    assert names(before.services("b")) == ["o.s"]
    assert after.services("b") == ()
    assert names(after.services("c")) == ["o.s", "x.y"]
    assert after.revision == 7
    assert before.revision == 1
    assert after.networks == {"b", "c"}
    assert after.apply([]) is after
    assert after.apply([], revision=9).revision == 9
    assert after.apply([Deletion((Kind.NETWORK, "b", "b"), 8)]).networks == {"c"}


changes = st.lists(
    st.one_of(
        st.builds(service, st.sampled_from("ab"), st.sampled_from(["o.s", "o.s.t", "x.y"]), st.sampled_from("12")),
        st.builds(network, st.sampled_from("abc")),
        st.builds(
            Deletion,
            st.tuples(st.sampled_from([Kind.SERVICE, Kind.NETWORK]), st.sampled_from("abc"), st.sampled_from("12abc")),
            st.just(1),
        ),
    ),
    max_size=30,
)


@given(changes, st.integers(0, 30))
def test_a_mesh_depends_only_on_the_last_change_of_each_record(all_changes: list[AnyRecord], cut: int) -> None:
    left: dict[object, AnyRecord] = {}
    for change in all_changes:
        if isinstance(change, Deletion):
            left.pop(change.key, None)
        else:
            left[change.key] = change
    at_once, expected = Mesh.EMPTY.apply(all_changes), Mesh.of(left.values())
    in_two = Mesh.EMPTY.apply(all_changes[:cut]).apply(all_changes[cut:])
    for mesh in (at_once, in_two):
        assert list(mesh) == list(expected)
        assert mesh.networks == expected.networks
        for network in expected.networks:
            assert mesh.service(network, "o.s") == expected.service(network, "o.s")
        assert mesh.services_beginning("a", "o.s") == expected.services_beginning("a", "o.s")


def test_records_round_trip() -> None:
    record = service("b", "o.s")
    data = msgspec.json.encode(record)
    assert data == (
        b'{"kind":"service","network":"b","id":"o.s","revision":1,"lease":null,'
        b'"spec":{"name":"o.s","ports":{"8443":[]}}}'
    )
    assert decode_record(data) == record
    assert decode_record(data[:-1] + b',"of":"a newer server"}') == record


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b'{"kind":"other","network":"b","id":"x","revision":1,"spec":{}}',
        b'{"kind":"network","network":"B","id":"B","revision":1,"spec":{}}',
        b'{"kind":"network","network":"b","id":"b","revision":"1","spec":{}}',
        b'{"kind":"network","network":"b","id":"b","revision":1,"spec":[]}',
        b'{"kind":"network","network":"b","id":"b","revision":1}',
    ],
)
def test_bad_records(data: bytes) -> None:
    with pytest.raises(BadRecord):
        decode_record(data)


@given(st.binary(max_size=100))
def test_garbage_gives_badrecord_only(data: bytes) -> None:
    try:
        decode_record(data)
    except BadRecord:
        pass
