"""Record data made with dnslib, read by dnspython."""

import dns.rdata
import pytest

from dnsgw.message.rdata import BadRdata, hinfo, soa, srv


def text(rdtype: str, data: bytes) -> str:
    return str(dns.rdata.from_wire("IN", rdtype, data, 0, len(data)))


def test_soa() -> None:
    assert text("SOA", soa("svc.mesh.internal", 7, 5)) == "svc.mesh.internal. nobody.invalid. 7 3600 1200 604800 5"
    assert text("SOA", soa("a.b", 2**32 + 3, 0)).split()[2] == "3"


def test_srv_writes_its_target_out() -> None:
    data = srv("p8443-10-1-0-5.b.svc.mesh.internal", 443)
    assert text("SRV", data) == "0 0 443 p8443-10-1-0-5.b.svc.mesh.internal."
    assert data.endswith(b"\x08internal\0")


def test_hinfo() -> None:
    assert text("HINFO", hinfo("RFC8482")) == '"RFC8482" ""'


@pytest.mark.parametrize("target", ["a" * 64 + ".b", "a..b", ".".join(["a" * 60] * 5)])
def test_errors_of_dnslib_become_one_error(target: str) -> None:
    with pytest.raises(BadRdata):
        srv(target, 443)


def test_bounds() -> None:
    with pytest.raises(BadRdata):
        srv("a.b", 65536)
    with pytest.raises(BadRdata):
        hinfo("x" * 256)
