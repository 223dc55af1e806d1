"""Shared by transports that dial the address and port of a candidate by TCP."""

from sniproxy.engine import ByteStream, connect
from sniproxy.transport.base import Candidate


class DialsTcp:
    """Dials the address of a candidate by TCP."""

    async def dial(self, candidate: Candidate, *, timeout_s: float) -> ByteStream:
        """Connect to a candidate. Raises OSError if that fails, TimeoutError if it takes longer than `timeout_s` seconds."""
        return await connect(candidate.address, candidate.port, timeout_s=timeout_s)
