"""What a client brought, as the relay's dialler gets it."""

import secrets
import time

from sniproxy.formats.client_hello import HelloReader
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest
from tests.sniproxy.gateways import KEY, KEY_C
from tests.sniproxy.hellos import client_hello

HELLO = client_hello("orders.shop.example")


def call(data: bytes = HELLO, behind: bytes = b"") -> StreamRequest:
    """A client that sent this ClientHello and something behind it."""
    hello = HelloReader().feed(data)
    assert hello is not None
    return StreamRequest(
        stream=secrets.token_bytes(16),
        client=("10.0.0.77", 40000),
        local=("10.0.0.9", 443),
        hello=hello,
        data=data + behind,
    )


def opener(**limits: float) -> GatewayConnector:
    """Network a's relay, with keys for b and c."""
    keys = SigningKeys({key.id: key for key in (KEY, KEY_C)})
    return GatewayConnector("a", keys, now_ms=lambda: time.time_ns() // 1_000_000, **limits)
