"""The view: how lines change the mesh, in chunks of any size, and which records survive a change of epoch."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.client.view import MAX_LINE, BadWatch, View
from discovery.model.mesh import Kind, Mesh, NetworkSpec, Record


def put(name: str, revision: int) -> bytes:
    record = Record(kind=Kind.NETWORK, network=name, id=name, revision=revision, spec=NetworkSpec())
    return msgspec.json.encode({"revision": revision, "type": "put", "record": record}) + b"\n"


def delete(name: str, revision: int) -> bytes:
    record = {"kind": "network", "network": name, "id": name}
    return msgspec.json.encode({"revision": revision, "type": "delete", "record": record}) + b"\n"


def reset(revision: int = 0, epoch: str = "e") -> bytes:
    return msgspec.json.encode({"revision": revision, "type": "reset", "epoch": epoch}) + b"\n"


def sync(revision: int, epoch: str = "e") -> bytes:
    return msgspec.json.encode({"revision": revision, "type": "sync", "epoch": epoch}) + b"\n"


def test_records_appear_at_sync() -> None:
    view = View()
    view.feed(reset() + put("a", 1) + put("b", 2), 0)
    assert view.mesh is Mesh.EMPTY
    assert (view.synced, view.live, view.revision) == (False, False, None)
    view.feed(sync(5), 0)
    assert view.mesh.networks == {"a", "b"}
    assert (view.synced, view.live, view.revision, view.mesh.revision, view.epoch) == (True, True, 5, 5, "e")


def test_changes_are_applied_as_they_arrive() -> None:
    view = View()
    view.feed(reset() + put("a", 1) + sync(1), 0)
    deletions = view.feed(put("b", 2) + b"\n" + delete("a", 3), 0)
    assert [deletion.key for deletion in deletions] == [(Kind.NETWORK, "a", "a")]
    assert view.mesh.networks == {"b"}
    assert view.revision == view.mesh.revision == 3


def test_an_empty_line_makes_no_new_mesh() -> None:
    view = View()
    view.feed(reset() + sync(0), 0)
    before = view.mesh
    view.feed(b"\n", 0)
    assert view.mesh is before


def test_an_incomplete_reset_changes_nothing() -> None:
    view = View()
    view.feed(reset() + put("a", 1) + sync(1), 0)
    view.feed(reset() + put("b", 2) + put("c", 3)[:-9], 0)
    view.ended()
    assert view.mesh.networks == {"a"}
    assert (view.revision, view.live) == (1, False)
    view.feed(put("d", 4) + sync(4), 0)  # resumed from 1
    assert view.mesh.networks == {"a", "d"}
    assert view.live


def test_a_reset_of_the_same_epoch_replaces_at_once() -> None:
    view = View()
    view.feed(reset() + put("a", 1) + put("b", 2) + sync(2), 0)
    kept = view.mesh.record(Kind.NETWORK, "b", "b")
    view.feed(reset() + put("b", 2) + put("c", 9) + sync(9), 0)
    assert view.mesh.networks == {"b", "c"}
    assert view.mesh.record(Kind.NETWORK, "b", "b") is kept
    assert view.next_expiry() is None


def test_records_stay_for_a_grace_period_after_a_change_of_epoch() -> None:
    view = View(grace_s=60)
    view.feed(reset() + put("a", 91) + put("b", 92) + put("c", 93) + put("d", 94) + sync(94), 0)
    view.feed(reset(epoch="f") + put("a", 1) + sync(1, "f"), 100)
    assert view.mesh.networks == {"a", "b", "c", "d"}
    assert (view.mesh.revision, view.revision, view.epoch) == (1, 1, "f")
    assert {record.id for record in view.confirmed()} == {"a"}
    view.feed(put("b", 2) + delete("c", 3), 110)
    assert view.next_expiry() == 160
    view.expire(159)
    assert view.mesh.networks == {"a", "b", "d"}
    view.expire(160)
    assert view.mesh.networks == {"a", "b"}
    assert view.next_expiry() is None
    assert view.mesh.revision == 3


def test_a_second_change_of_epoch_does_not_extend_the_grace_period() -> None:
    view = View(grace_s=60)
    view.feed(reset() + put("a", 1) + sync(1), 0)
    view.feed(reset(epoch="f") + put("b", 1) + sync(1, "f"), 100)
    view.feed(reset(epoch="g") + sync(0, "g"), 130)
    view.expire(160)
    assert view.mesh.networks == {"b"}
    # A reset within the new epoch does not end the grace period either.
    view.feed(reset(epoch="g") + sync(0, "g"), 170)
    assert view.mesh.networks == {"b"}
    view.expire(190)
    assert view.mesh.networks == set()


def test_a_restored_view_resumes() -> None:
    view = View()
    record = Record(kind=Kind.NETWORK, network="a", id="a", revision=3, spec=NetworkSpec())
    view.restore(Mesh.of([record]), "e", 7)
    assert (view.synced, view.live, view.epoch, view.revision, view.mesh.revision) == (True, False, "e", 7, 7)
    view.feed(put("b", 8) + sync(8), 0)
    assert view.mesh.networks == {"a", "b"}


def test_unknown_kinds_and_fields_are_skipped() -> None:
    view = View()
    view.feed(reset() + sync(1), 0)
    newer = {"kind": "network", "network": "a", "id": "a", "revision": 2, "spec": {"new": 1}}
    for line in (
        {"revision": 2, "type": "put", "record": newer},
        {"revision": 3, "type": "put", "record": {**newer, "kind": "other"}},
        {"revision": 4, "type": "delete", "record": {"kind": "other", "network": "a", "id": "a"}},
        {"revision": 5, "type": "other", "new": []},
    ):
        view.feed(msgspec.json.encode(line) + b"\n", 0)
    assert len(view.mesh) == 0
    assert view.skipped == 2
    assert view.revision == 5


@pytest.mark.parametrize("line", [b"x\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 100_000 + b"\n", b'{"revision":"1"}\n'])
def test_invalid_lines_are_refused(line: bytes) -> None:
    with pytest.raises(BadWatch):
        View().feed(line, 0)


def test_lines_and_records_are_bounded() -> None:
    view = View()
    with pytest.raises(BadWatch, match="bytes"):
        for _ in range(MAX_LINE // 65536 + 2):
            view.feed(b"x" * 65536, 0)
    with pytest.raises(BadWatch, match="bytes"):
        View().feed(b" " * (MAX_LINE + 1) + b"\n", 0)
    with pytest.raises(BadWatch, match="records"):
        View(max_records=2).feed(reset() + put("a", 1) + put("b", 2) + put("c", 3), 0)


@given(st.lists(st.integers(0, 400), max_size=8))
def test_any_cut_gives_the_same(cuts: list[int]) -> None:
    data = reset() + put("a", 1) + put("b", 2) + sync(2) + b"\n" + put("c", 3) + delete("a", 4) + delete("zz", 5)
    view = View()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        view.feed(data[begin:end], 0)
    assert view.mesh.networks == {"b", "c"}
    assert view.revision == 5


@given(st.binary(max_size=200))
def test_garbage_gives_badwatch_only(data: bytes) -> None:
    try:
        View().feed(data + b"\n", 0)
    except BadWatch:
        pass


def test_a_view_resumes_before_a_revision_that_was_incomplete() -> None:
    view = View()
    view.feed(reset() + put("a", 1) + put("b", 2) + sync(2), 0)
    first = delete("a", 5).replace(b'"revision":5', b'"revision":5,"more":true')
    view.feed(first, 0)
    assert view.mesh.networks == {"b"}
    assert view.revision == 2
    view.feed(delete("b", 5), 0)
    assert view.revision == 5


def test_a_server_that_is_cut_off_says_so() -> None:
    view = View()
    view.feed(reset() + sync(2), 0)
    view.feed(b'{"revision":2,"type":"stale","age_s":7.5}\n', 0)
    assert (view.stale_s, view.live, view.revision) == (7.5, True, 2)
    view.feed(b"\n", 0)
    assert view.stale_s == 0
    view.feed(b'{"revision":2,"type":"stale","age_s":7.5}\n', 0)
    view.ended()
    assert view.stale_s == 0


def test_records_deleted_during_an_outage_stay_for_a_grace_period() -> None:
    view = View(outage_grace_s=10)
    view.feed(reset() + put("a", 1) + put("b", 2) + put("c", 3) + sync(3), 0)
    view.ended(100)
    # Ten minutes later etcd has ended the leases of all writers that could not renew them, whether they are alive or not.
    view.feed(delete("a", 4) + delete("b", 4) + sync(4), 700)
    assert view.mesh.networks == {"a", "b", "c"}
    view.feed(put("a", 5), 701)
    view.expire(710)
    assert view.mesh.networks == {"a", "c"}
    view.feed(delete("c", 6), 711)  # live again: deletions apply at once
    assert view.mesh.networks == {"a"}
    view.ended(720)
    view.feed(reset() + sync(7), 1000)
    assert view.mesh.networks == {"a"}
    view.expire(1010)
    assert not view.mesh.networks
    view.feed(put("d", 8), 1011)
    view.ended(1012)
    view.feed(reset() + sync(9), 1013)  # after a short outage
    assert not view.mesh.networks
