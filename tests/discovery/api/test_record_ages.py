"""The ages of records."""

from discovery.api.record_ages import RecordAges
from discovery.model.mesh import Deletion, Kind, NetworkSpec, Record

A = Record(kind=Kind.NETWORK, network="a", id="a", revision=1, spec=NetworkSpec())
B = Record(kind=Kind.NETWORK, network="b", id="b", revision=2, spec=NetworkSpec())


def test_ages_of_records_created_since_the_start() -> None:
    now = 100.0
    ages = RecordAges(lambda: now)
    ages.known([A.key])
    ages.apply([A, B])
    now = 105.0
    ages.apply([B])
    assert ages.now() == {B.key: 5}
    ages.apply([Deletion(A.key, 3), Deletion(B.key, 4)])
    ages.apply([A])
    now = 106.0
    assert ages.now() == {A.key: 1}
