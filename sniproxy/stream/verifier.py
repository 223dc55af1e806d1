"""Who may come in: each preamble is proven once, in one order of checks, and its ClientHello afterwards."""

import hmac
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from sniproxy.stream.preamble import SIGNATURE_SIZE, Preamble, PreambleError, SigningKey, WarmPreamble, parse, signature
from sniproxy.stream.reason import Reason

TIME_WINDOW_MS: Final = 60_000
"""How far the signer's clock may be from ours."""
REPLAY_WINDOW_MS: Final = 2 * TIME_WINDOW_MS
"""How long a stream id is remembered: a header from the furthest future that passes stays fresh for this long."""
MAX_REPLAYS: Final = 1 << 18
"""Streams remembered: 2,184 new ones a second for two minutes, some 50 MB if it ever gets there."""


def check_hello(preamble: Preamble, server_name: str, digest: bytes) -> None:
    """Check that this ClientHello is the one that the preamble was signed for.

    Raises PreambleError (bad_signature).
    """
    if preamble.hello_digest is None or not hmac.compare_digest(preamble.hello_digest, digest):
        raise PreambleError(Reason.BAD_SIGNATURE, "the ClientHello is not the one that was signed for")
    if preamble.authority != server_name:
        raise PreambleError(Reason.BAD_SIGNATURE, "the ClientHello has another name than was signed")


class ReplayCache:
    """Remembers what was seen for two minutes, up to a fixed number.

    When it is full it refuses what is new rather than forget what is old: only holders of a key can fill it, and forgetting
    would let a captured header in again at the very moment of a flood.
    """

    __slots__ = ("_seen", "max_entries", "window_ms")

    def __init__(self, max_entries: int = MAX_REPLAYS, window_ms: int = REPLAY_WINDOW_MS) -> None:
        self.max_entries = max_entries
        self.window_ms = window_ms
        self._seen: OrderedDict[bytes, int] = OrderedDict()  # in order of arrival

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, seen: bytes, now_ms: int) -> None:
        """Remember `seen`. Raises PreambleError: replay if it is remembered already, overloaded if the cache is full."""
        while self._seen and next(iter(self._seen.values())) + self.window_ms < now_ms:
            self._seen.popitem(last=False)
        if seen in self._seen:
            raise PreambleError(Reason.REPLAY, "this stream and attempt were here before")
        if len(self._seen) >= self.max_entries:
            raise PreambleError(Reason.OVERLOADED, f"{self.max_entries} streams within {self.window_ms} ms")
        self._seen[seen] = now_ms


class PreambleVerifier:
    """Verifies the preambles that arrive at one gateway of `network`.

    `keys` may be replaced at any time; `replays` may be shared by verifiers.
    """

    __slots__ = ("keys", "network", "replays")

    def __init__(self, keys: Mapping[str, SigningKey], network: str, replays: ReplayCache | None = None) -> None:
        self.keys = keys
        self.network = network
        self.replays = ReplayCache() if replays is None else replays

    def verify(self, header: bytes, *, addressee: str, now_ms: int) -> Preamble | WarmPreamble:
        """Return what a complete header says, once all of it is proven.

        Args:
            header: exactly the bytes of the header, `read_length` of them.
            addressee: the id of the allocation or gateway record by which it came.
            now_ms: unix time in milliseconds.

        Raises:
            PreambleError: with the reason of the first check that failed: layout, key, signature, time, network and
                addressee, replay.
        """
        preamble = parse(header)
        direction = preamble.from_network, preamble.to_network
        key = self.keys.get(preamble.key_id)
        if key is None or (key.from_network, key.to_network) != direction:
            # The same words for both: who has not proven anything learns nothing about our keys.
            raise PreambleError(
                Reason.NO_KEY, f"no key {preamble.key_id!r} here for streams from {direction[0]!r} to {direction[1]!r}"
            )
        if not hmac.compare_digest(signature(header, key.secret), header[-SIGNATURE_SIZE:]):
            raise PreambleError(Reason.BAD_SIGNATURE, f"not signed with key {key.id!r}")
        skew_ms = preamble.time_ms - now_ms
        if abs(skew_ms) > TIME_WINDOW_MS:
            raise PreambleError(Reason.CLOCK_SKEW, f"signed {skew_ms} ms from now")
        if preamble.to_network != self.network:
            raise PreambleError(Reason.REPLAY, f"meant for network {preamble.to_network!r}")
        if preamble.addressee != addressee:
            raise PreambleError(Reason.REPLAY, f"meant for {preamble.addressee!r}, came by {addressee!r}")
        self.replays.add(preamble.once, now_ms)
        return preamble
