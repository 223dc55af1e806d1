"""Which peers an allocation lets in: the relays of its network, each for a while longer than its record.

Sans-IO: `now` is monotonic seconds.
"""


class AdmittedPeers:
    """A relay that drains has withdrawn its record, but still has clients whose resolver has cached its address."""

    def __init__(self) -> None:
        self._wanted: frozenset[str] = frozenset()
        self._leaving: dict[str, float] = {}  # address to the time it is forgotten

    @property
    def addresses(self) -> frozenset[str]:
        """Those that may connect."""
        return self._wanted | self._leaving.keys()

    def want(self, addresses: frozenset[str], now: float, linger_s: float) -> bool:
        """Take the addresses of today's records. True if they differ from those before: call `forget` in `linger_s`."""
        if addresses == self._wanted:
            return False
        for address in self._wanted - addresses:
            self._leaving[address] = now + linger_s
        self._wanted = addresses
        self.forget(now)
        return True

    def forget(self, now: float) -> None:
        """Drop the addresses whose time is over."""
        self._leaving = {address: until for address, until in self._leaving.items() if until > now}
