"""What transports share that dial the address and port of a candidate by TCP."""

from sniproxy.engine import ByteStream, connect
from sniproxy.transport.base import Candidate


class DialsTcp:
    """Connects to a candidate's own address."""

    async def dial(self, candidate: Candidate, *, timeout_s: float) -> ByteStream:
        """Connect. OSError if that cannot be, TimeoutError if it takes too long."""
        return await connect(candidate.address, candidate.port, timeout_s=timeout_s)
