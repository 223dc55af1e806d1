"""The record gets one port after the other, and is withdrawn once."""

import logging

import pytest

from discovery.model.spec import MAX_ID
from tests.support.registered import HandDiscovery
from turnreg.client.control_connection import Credentials
from turnreg.registrar.allocation_factory import Server
from turnreg.registrar.allocation_record import AllocationRecord, record_id
from turnreg.registrar.config import RegistrarConfig

SERVER = Server(url="turn:192.0.2.1", family=1, port_min=1024, port_max=2000)
CONFIG = RegistrarConfig(network="b", gateway="gw-1", turn={"a": Credentials(username="u", password="p")}, weight=3)


def test_each_port_is_written_once() -> None:
    discovery = HandDiscovery()
    record = AllocationRecord(discovery, "gw-1", "a", "turn-1", 0)
    assert record.publish(1500, SERVER, CONFIG)
    assert not record.publish(1500, SERVER, CONFIG)
    assert record.publish(1501, SERVER, CONFIG)
    spec = discovery.published["gw-1.a.turn-1"]
    assert (spec.port, spec.weight, spec.via, discovery.writes) == (1501, 3, "a", 2)


def test_withdrawn_once_and_not_at_all_after_a_handover() -> None:
    discovery = HandDiscovery()
    record = AllocationRecord(discovery, "gw-1", "a", "turn-1", 0)
    record.withdraw()
    record.publish(1500, SERVER, CONFIG)
    record.withdraw()
    record.withdraw()
    assert (discovery.withdrawn, record.published) == (1, False)
    record.publish(1500, SERVER, CONFIG)
    record.leave()
    record.withdraw()
    assert discovery.withdrawn == 1


def test_a_write_that_fails_is_tried_again() -> None:
    discovery = HandDiscovery()
    discovery.broken = True
    record = AllocationRecord(discovery, "gw-1", "a", "turn-1", 0)
    with pytest.raises(RuntimeError):
        record.publish(1500, SERVER, CONFIG)
    discovery.broken = False
    assert record.publish(1500, SERVER, CONFIG)


def test_a_port_that_relays_will_refuse_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    record = AllocationRecord(HandDiscovery(), "gw-1", "a", "turn-1", 0)
    with caplog.at_level(logging.WARNING):
        record.publish(2001, SERVER, CONFIG)
    assert caplog.messages == ["relayed_port_outside"]


def test_ids_differ_by_gateway_server_and_replica_and_fit() -> None:
    long = "g" * MAX_ID
    ids = [
        record_id(gateway, "a", turn, replica)
        for gateway in ("gw-1", "gw.1", long)
        for turn in ("turn-1", "turn.1", long)
        for replica in range(3)
    ]
    assert len(set(ids)) == len(ids)
    assert max(map(len, ids)) <= MAX_ID
    assert record_id("gw-1", "a", "turn-1", 1) == "gw-1.a.turn-1.2"
