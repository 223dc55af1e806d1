"""What Services ask to have exported, and what of that cannot be."""

from typing import Any

import msgspec
import pytest

from discovery.model.spec import MAX_PORTS, HealthCheck
from discovery.publisher.export import Export, listed, read_export
from discovery.publisher.objects import ServiceObject

HTTPS, HTTP = {"name": "https", "port": 8443}, {"name": "http", "port": 80, "protocol": "TCP"}
DNS_UDP = {"name": "dns", "port": 53, "protocol": "UDP"}


def read(annotations: dict[str, str], *ports: dict[str, Any], **spec: Any) -> Export | None:
    metadata = {"namespace": "shop", "name": "orders", "annotations": annotations}
    return read_export(msgspec.convert({"metadata": metadata, "spec": {"ports": list(ports)} | spec}, ServiceObject))


def asked(export: str, *ports: dict[str, Any], **spec: Any) -> Export:
    found = read({"crossnet.io/export": export}, *ports, **spec)
    assert found is not None
    return found


def numbers(export: Export) -> list[int]:
    return [number for _, number in export.ports]


@pytest.mark.parametrize("annotations", [{}, {"crossnet.io/export": ""}, {"crossnet.io/export": " false"}])
def test_services_that_do_not_ask(annotations: dict[str, str]) -> None:
    assert read(annotations, HTTPS) is None


@pytest.mark.parametrize(
    ("export", "ports", "published", "reason", "message"),
    [
        ("https, 80", [HTTPS, HTTP], [8443, 80], "", ""),
        ("htps", [HTTPS, HTTP], [], "UnknownPort", "'htps'; it has https, http"),
        ("htps, http", [HTTPS, HTTP], [80], "UnknownPort", "'htps'; it has"),
        ("8444", [{"port": 8443}], [], "UnknownPort", "'8444'; it has 8443"),
        ("true, https", [HTTPS], [8443], "UnknownPort", "'true'"),
        ("true", [DNS_UDP], [], "NotTcp", "not exported: only TCP is carried, not dns (UDP)"),
        ("dns, https", [DNS_UDP, HTTPS], [8443], "NotTcp", "without some ports"),
        ("true", [{"port": 9, "protocol": "SCTP"}], [], "NotTcp", "9 (SCTP)"),
        ("true", [], [], "NoPorts", "has no ports"),
        ("https", [], [], "UnknownPort", "it has none"),
        ("x" * 300, [HTTPS], [], "UnknownPort", "x…"),
    ],
)
def test_what_cannot_be_exported_is_reported(
    export: str, ports: list[dict[str, Any]], published: list[int], reason: str, message: str
) -> None:
    found = asked(export, *ports)
    assert numbers(found) == published
    assert "".join(finding.reason for finding in found.findings) == reason
    assert message in "".join(finding.message for finding in found.findings)
    assert all(finding.warning for finding in found.findings)


def test_datagrams_beside_streams_are_no_warning_unless_they_are_asked_for() -> None:
    (finding,) = asked("true", DNS_UDP, HTTPS).findings
    assert (finding.reason, finding.warning) == ("NotTcp", False)


def test_an_external_name_is_not_exported() -> None:
    found = asked("true", HTTPS, type="ExternalName", externalName="x.example")
    assert numbers(found) == []
    assert [finding.reason for finding in found.findings] == ["ExternalName"]


def test_more_ports_than_a_record_holds() -> None:
    found = asked("true", *({"name": f"p-{number}", "port": number} for number in range(1, MAX_PORTS + 12)))
    assert numbers(found) == list(range(1, MAX_PORTS + 1))
    (finding,) = found.findings
    assert finding.reason == "TooManyPorts"
    assert "p-65, p-66" in finding.message
    assert "and 3 more" in finding.message


def test_port_names() -> None:
    assert asked("true", HTTPS, {"port": 80}, {"name": "443", "port": 444}).port_names == {"https": 8443}


@pytest.mark.parametrize(
    ("annotation", "value", "what"),
    [
        ("proxy-protocol", "v3", "no PROXY header"),
        ("health-check", "http", "no checks"),
        ("health-check", "tls 0", "no checks"),
    ],
)
def test_other_annotations_that_mean_nothing_are_reported(annotation: str, value: str, what: str) -> None:
    found = read({"crossnet.io/export": "true", f"crossnet.io/{annotation}": value}, HTTPS)
    assert found is not None
    assert numbers(found) == [8443]
    (finding,) = found.findings
    assert finding.reason == "InvalidAnnotation"
    assert what in finding.message
    assert repr(value) in finding.message


def test_valid_annotations_are_not_reported() -> None:
    for header in ("v1", "v2", "true", "false", ""):
        more = {"crossnet.io/proxy-protocol": header, "crossnet.io/health-check": "tls 30"}
        found = read({"crossnet.io/export": "true"} | more, HTTPS)
        assert found is not None
        assert found.findings == ()
        assert found.health == HealthCheck(check="tls", interval_s=30)


def test_long_lists_are_shortened() -> None:
    assert listed(map(str, range(8))) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(map(str, range(10))).endswith("7 and 2 more")
