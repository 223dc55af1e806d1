"""Which peers may connect to an allocation: the relays of its network, each for some time longer than its record exists.

Sans-IO: `now` is monotonic seconds.
"""


class AdmittedPeers:
    """The addresses that may connect. They outlive their records: a draining relay still has clients that cached its address."""

    def __init__(self) -> None:
        self._wanted: frozenset[str] = frozenset()
        self._leaving: dict[str, float] = {}  # address to the time it is removed

    @property
    def addresses(self) -> frozenset[str]:
        """The addresses that may connect."""
        return self._wanted | self._leaving.keys()

    def want(self, addresses: frozenset[str], now: float, linger_s: float) -> bool:
        """Set the addresses of the current records. True if they have changed: then call `forget` after `linger_s`."""
        if addresses == self._wanted:
            return False
        for address in self._wanted - addresses:
            self._leaving[address] = now + linger_s
        self._wanted = addresses
        self.forget(now)
        return True

    def forget(self, now: float) -> None:
        """Remove the addresses whose time is over."""
        self._leaving = {address: until for address, until in self._leaving.items() if until > now}
