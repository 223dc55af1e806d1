"""Settings that contradict each other are refused with a clear error."""

from typing import Any

import pytest

from turnreg.server import Limits, TurnServerConfig

GOOD: dict[str, Any] = {
    "listen": (("127.0.0.1", 0),),
    "relay_addresses": ("127.0.0.1",),
    "realm": "lab",
    "users": {"u": "hidden"},
}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"listen": ()}, "listen, listen_tls, listen_udp: expected at least one"),
        ({"listen_tls": (("127.0.0.1", 0),)}, "tls_cert, tls_key: expected both"),
        ({"advertised": {"10.0.0.1": "192.0.2.1"}}, "advertised: expected relay addresses"),
        ({"advertised": {"127.0.0.1": "2001:db8::1"}}, "advertised: expected the family"),
        ({"limits": Limits(max_bytes_per_second_per_account=0)}, "limits: expected bytes per second"),
        ({"users": {}}, "users, secrets"),
        ({"realm": ""}, "realm: expected 1 to 127"),
        ({"realm": "x" * 128}, "realm: expected 1 to 127"),
        ({"port_min": 0}, "ports: expected a range"),
        ({"port_max": 65_536}, "ports: expected a range"),
        ({"port_min": 5000, "port_max": 4999}, "ports: expected a range"),
        ({"relay_addresses": ()}, "relay_addresses: expected one"),
        ({"relay_addresses": ("10.0.0.1", "10.0.0.2")}, "relay_addresses: expected one"),
        ({"relay_addresses": ("0.0.0.0",)}, "relay_addresses: expected an address of this host"),
        ({"relay_addresses": ("turn.example",)}, "turn.example"),
    ],
)
def test_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TurnServerConfig(**(GOOD | changes))


def test_one_address_of_each_family() -> None:
    config = TurnServerConfig(**(GOOD | {"relay_addresses": ("10.0.0.1", "fd00::1")}))
    assert (config.port_min, config.port_max) == (49_152, 65_535)


def test_secrets_are_not_shown() -> None:
    config = TurnServerConfig(**(GOOD | {"secrets": ("north-secret",)}))
    assert "hidden" not in repr(config)
    assert "north-secret" not in repr(config)
