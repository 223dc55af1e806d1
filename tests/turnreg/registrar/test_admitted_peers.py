"""A relay whose record is gone may connect for a while longer."""

from turnreg.registrar.admitted_peers import AdmittedPeers

A, B = "192.0.2.1", "192.0.2.2"


def test_each_stays_for_a_while_after_its_record() -> None:
    peers = AdmittedPeers()
    assert peers.want(frozenset({A, B}), 10, 60)
    assert not peers.want(frozenset({A, B}), 11, 60)
    assert peers.want(frozenset({B}), 20, 60)
    assert peers.addresses == {A, B}
    peers.forget(79)
    assert peers.addresses == {A, B}
    peers.forget(80)
    assert peers.addresses == {B}


def test_an_address_that_returns_stays() -> None:
    peers = AdmittedPeers()
    peers.want(frozenset({A}), 10, 60)
    peers.want(frozenset(), 20, 60)
    peers.want(frozenset({A}), 30, 60)
    peers.forget(80)
    assert peers.addresses == {A}
