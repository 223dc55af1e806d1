"""Preambles for tests of the gateway: from a relay in network a to a gateway in network b."""

import hashlib
import secrets
import time
from dataclasses import replace

from discovery.model.addresses import BadAddress, parse_endpoint
from discovery.model.names import AddressTarget, encode
from sniproxy.tunnel.preamble import Preamble, SigningKey

KEY = SigningKey(id="ab-1", secret=bytes(range(32)), from_network="a", to_network="b")


def address_name(endpoint: str, network: str = "b") -> str:
    """Return the name by which a client asks for an address and port."""
    return encode(AddressTarget(network, *parse_endpoint(endpoint)), "svc.mesh.internal")


def name_for(target: str) -> str:
    """Return a name that leads to this target."""
    try:
        return address_name(target)
    except BadAddress:
        return target.rpartition(":")[0]


def preamble(target: str, hello: bytes = b"", **changes: object) -> Preamble:
    """Return a preamble that is valid now, for the record `gw-1`. `hello` is a ClientHello in one record."""
    made = Preamble(
        client=("10.0.0.77", 40000),
        local=("10.0.0.9", 443),
        authority="orders.shop.example",
        stream_id=secrets.token_bytes(16),
        from_network="a",
        to_network="b",
        addressee="gw-1",
        key_id=KEY.id,
        time_ms=time.time_ns() // 1_000_000,
        target=target,
        hello_digest=hashlib.sha256(hello[5:]).digest(),
        attempt=1,
    )
    return replace(made, **changes)  # type: ignore[arg-type]
