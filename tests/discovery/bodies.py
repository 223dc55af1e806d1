"""Request bodies for the tests of the HTTP API."""

from typing import Any

RELAY = {"spec": {"addresses": ["10.0.0.9"], "ports": [443]}}
VIP = {"spec": {"name": "orders.shop.svc", "address": "10.200.0.1"}}
TURN = {
    "spec": {"url": "turn:192.0.2.7", "relay_addresses": ["10.0.0.7"], "port_min": 49152, "port_max": 65535},
}


def service(name: str) -> dict[str, Any]:
    return {"spec": {"name": name, "ports": {"8443": ["10.1.0.5:8443"]}}}
