"""Which address a TURN server sees this relay come from: a gateway's permission there must be for exactly that one."""

import logging
import socket

from discovery.addresses import BadAddress, parse_address, parse_turn_url
from discovery.model import Record
from discovery.spec import TurnSpec
from turnreg.binding import mapped_address
from turnreg.control import TurnError

log = logging.getLogger(__name__)

TIMEOUT_S = 3.0


async def learn_source(turn: Record[TurnSpec]) -> str | None:
    """Ask a TURN server of our own network by STUN; where it does not answer, take the address that we reach it from.

    The relay dials relayed addresses, so these are asked first, and the one in the URL, which is for gateways of other
    networks, only then. None: no way leads there at all.
    """
    try:
        url = parse_turn_url(turn.spec.url)
    except BadAddress:
        return None
    addresses = [*turn.spec.relay_addresses]
    if _is_address(url.host) and url.host not in addresses:
        addresses.append(url.host)
    if not url.tls:
        for address in addresses:
            try:
                return await mapped_address(address, url.port, TIMEOUT_S)
            except TurnError as error:
                log.debug("no STUN answer from %s port %s: %s", address, url.port, error)
    return next((source for address in addresses if (source := _own_address_towards(address)) is not None), None)


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except BadAddress:
        return False
    return True


def _own_address_towards(address: str) -> str | None:
    """Return the address that the kernel would choose for a connection; nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
