"""The defaults of a server's configuration."""

from ipaddress import ip_address

import pytest

from discovery.model.addresses import PRIVATE_RANGES
from dnsgw import DnsConfig


def test_defaults() -> None:
    config = DnsConfig(network="a", listen=())
    assert (config.domain, config.ttl_s, config.upstream) == ("svc.mesh.internal", 5, ())
    assert str(config.resolv_conf) == "/etc/resolv.conf"
    assert config.allow == PRIVATE_RANGES
    assert not config.imports


@pytest.mark.parametrize("text", ["8.8.8.8", "172.15.255.255", "192.169.0.0", "2001:db8::1", "2000::", "0.0.0.0", "::"])
def test_the_world_is_not_private(text: str) -> None:
    assert not any(ip_address(text) in network for network in PRIVATE_RANGES)
