"""The keys that sign a relay's preambles, by direction."""

from collections.abc import Mapping

from sniproxy.tunnel.preamble import SigningKey


class SigningKeys:
    """Signing keys by direction. If a direction has several, the first one signs."""

    def __init__(self, keys: Mapping[str, SigningKey]) -> None:
        self._first: dict[tuple[str, str], SigningKey] = {}
        for key in keys.values():
            self._first.setdefault((key.from_network, key.to_network), key)

    def get(self, from_network: str, to_network: str) -> SigningKey | None:
        """Return the key that signs streams in this direction, None if there is none."""
        return self._first.get((from_network, to_network))
