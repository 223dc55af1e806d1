"""Finds the address from which a TURN server sees this relay connect: a gateway's permission must be for exactly that one."""

import logging
import socket
import ssl
from dataclasses import dataclass
from functools import partial

from discovery.model.addresses import BadAddress, TurnUrl, parse_address, parse_turn_url
from discovery.model.mesh import Record
from discovery.model.spec import TurnSpec
from sniproxy.engine import connect, connect_tls
from turnreg.client.allocation import Dial
from turnreg.client.control_connection import TurnError
from turnreg.client.reflexive_address import mapped_address

log = logging.getLogger(__name__)

TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Our address as one TURN server sees it."""

    address: str | None
    """None: there is no route to the server."""
    asked: bool
    """The server has reported it. Otherwise it is our local address for that route, which is wrong behind a NAT."""
    detail: str = ""
    """Why the server could not be asked."""


async def learn_source(turn: Record[TurnSpec]) -> Source:
    """Ask a TURN server of our own network by STUN; if it does not answer, use our local address for the route to it.

    The relay dials relayed addresses, so these are asked first, and then the one in the URL, which is for gateways of other
    networks.
    """
    try:
        url = parse_turn_url(turn.spec.url)
    except BadAddress as error:
        return Source(address=None, asked=False, detail=str(error))
    addresses = [*turn.spec.relay_addresses]
    if _is_address(url.host) and url.host not in addresses:
        addresses.append(url.host)
    details = []
    for address in addresses:
        try:
            return Source(address=await mapped_address(address, url.port, TIMEOUT_S, _dial(url)), asked=True)
        except TurnError as error:
            details.append(f"{address} port {url.port}: {error}")
    assumed = next((source for address in addresses if (source := _own_address_towards(address)) is not None), None)
    return Source(address=assumed, asked=False, detail="; ".join(details) or "its record has no address to ask")


def _dial(url: TurnUrl) -> Dial:
    """Return the function that connects to the server.

    With TLS, the certificate is not verified: there is no setting for the CA of our own network's servers, and the same question
    over plain TCP would prove no more.
    """
    if not url.tls:
        return connect
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return partial(connect_tls, context=context, server_hostname=url.host)


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except BadAddress:
        return False
    return True


def _own_address_towards(address: str) -> str | None:
    """Return the local address that the kernel would choose for a connection. Nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
