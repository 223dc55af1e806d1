"""Requests for streams, and upstreams that connect them."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry

from discovery.model.addresses import TargetList
from sniproxy.access.loop_guard import LoopGuard
from sniproxy.endpoints.dialer import EndpointDialer
from sniproxy.formats.client_hello import HelloReader
from sniproxy.relay.upstreams import DEFAULT_DIAL_TIMEOUT_S, Upstreams
from sniproxy.transport.base import TransportConfig
from sniproxy.transport.registry import make_transports
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest
from tests.support.hellos import client_hello
from tests.support.scripted_gateways import KEY, KEY_C

HELLO = client_hello("orders.shop.example")


def call(data: bytes = HELLO, behind: bytes = b"") -> StreamRequest:
    """Return the request of a client that sent this ClientHello with some data behind it."""
    hello = HelloReader().feed(data)
    assert hello is not None
    return StreamRequest(
        stream=secrets.token_bytes(16),
        client=("10.0.0.77", 40000),
        local=("10.0.0.9", 443),
        hello=hello,
        data=data + behind,
    )


def connector(**limits: float) -> GatewayConnector:
    """Return the connector of network a's relay, with keys for b and c."""
    keys = SigningKeys({key.id: key for key in (KEY, KEY_C)})
    return GatewayConnector("a", keys, now_ms=lambda: time.time_ns() // 1_000_000, **limits)


def upstreams(
    connects: GatewayConnector | None = None,
    *,
    registry: CollectorRegistry | None = None,
    dial_timeout_s: float = DEFAULT_DIAL_TIMEOUT_S,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    **limits: float,
) -> Upstreams:
    """The upstreams of such a relay, which keeps no warm connections."""
    registry = registry or CollectorRegistry()
    made = Upstreams(registry, EndpointDialer("relay", registry), sleep=sleep)
    config = TransportConfig(network="a", deliver=TargetList(), direct=TargetList(), guard=LoopGuard("a"))
    made.reconfigure(connects or connector(**limits), make_transports(config), pool=0, dial_timeout_s=dial_timeout_s)
    return made
