"""The resolver's section: its values, and the configuration made of it."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from crossnet.app import role_configs
from crossnet.config.file import ConfigError, effective, load

HEAD = "network: a\ndiscovery: mesh.yaml\n"


def write(folder: Path, section: str) -> Path:
    (folder / "mesh.yaml").write_text("networks: [{id: a}]\n")
    (folder / "ca.pem").write_text("pem\n")
    (folder / "secret").write_text("00" * 16 + "\n")
    path = folder / "crossnet.yaml"
    path.write_text(HEAD + f"dns: {{listen: 127.0.0.1:0, search: [], {section}}}\n")
    return path


FULL = """
  upstream: [tls://10.0.0.10#dns.example, https://10.0.0.11/dns-query], upstream_ca: ca.pem, race: 100ms,
  forward: {corp.example: 10.1.0.53, lab.example: [tcp://10.2.0.53, 10.2.0.54]}, random_case: true, rate_limit: 500,
  max_udp_reply: 900, vip: 240.0.0.0/16, stale_relays: 5m, cache: 8MiB, max_ttl: 10m, max_negative_ttl: 1m, reuse_port: true,
  stale_answers: 1h, absent: [mask.icloud.com, 10.0.0.0/8], cookie_secret: {file: secret}, loop_probe: false
"""


def test_all_of_it(tmp_path: Path) -> None:
    config = load(write(tmp_path, FULL))
    assert config.dns is not None
    made = role_configs.dns_config(config, config.dns)
    assert [str(upstream) for upstream in made.upstream] == [
        "tls://10.0.0.10#dns.example",
        "https://10.0.0.11/dns-query",
    ]
    assert {zone: list(map(str, found)) for zone, found in made.forward.items()} == {
        "corp.example": ["10.1.0.53"],
        "lab.example": ["tcp://10.2.0.53", "10.2.0.54"],
    }
    assert (made.upstream_ca, made.race_s, made.random_case) == ("pem\n", 0.1, True)
    assert f"upstream_ca: {tmp_path}/ca.pem" in effective(config)
    assert (made.rate_limit, made.max_udp_reply, made.vip) == (500, 900, ip_network("240.0.0.0/16"))
    assert (made.stale_relays_for_s, made.reuse_port, made.loop_probe) == (300, True, False)
    assert (made.cache.max_bytes, made.cache.max_ttl_s) == (8 << 20, 600)
    assert (made.cache.max_negative_ttl_s, made.cache.stale_for_s) == (60, 3600)
    assert made.cookie_secret == bytes(16)
    assert made.search == ()
    assert made.absent == ("mask.icloud.com", ip_network("10.0.0.0/8"))
    assert "absent: [mask.icloud.com, 10.0.0.0/8]" in effective(config)
    assert "00000000" not in str(effective(config))


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ("upstream: [dns.example]", "$.dns.upstream[0]"),
        ("forward: {corp.example: [x]}", '$.dns.forward["corp.example"][0]'),
        ("forward: {mesh.internal: 10.0.0.1}", "$.domain"),
        ("upstream: 10.0.0.1, upstream_ca: ca.pem", "$.dns.upstream_ca"),
        ("absent: [10.0.0.1/8]", "$.dns.absent[0]"),
        ("absent: [a..b]", "$.dns.absent[0]"),
        ("vip: 240.0.0.0/30", "$.dns.vip"),
        ("max_udp_reply: 4096", "$.dns.max_udp_reply"),
        ("cookie_secret: {file: ca.pem}", "$.dns.cookie_secret"),
    ],
)
def test_errors_are_reported(tmp_path: Path, section: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, section))
    assert [found.path for found in caught.value.faults] == [fault]
