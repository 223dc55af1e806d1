"""The keys with which a relay signs its preambles, by direction."""

from collections.abc import Mapping

from sniproxy.tunnel.preamble import SigningKey


class SigningKeys:
    """The keys by direction; the first one for a pair of networks signs."""

    def __init__(self, keys: Mapping[str, SigningKey]) -> None:
        self._first: dict[tuple[str, str], SigningKey] = {}
        for key in keys.values():
            self._first.setdefault((key.from_network, key.to_network), key)

    def get(self, from_network: str, to_network: str) -> SigningKey | None:
        """Give the key that signs streams in this direction, None if there is none."""
        return self._first.get((from_network, to_network))
