"""Verifies preambles at a gateway, in a fixed order of checks, and afterwards their ClientHellos.

A preamble is for us and not a replay, because it signs the epoch of this very process, which excludes preambles from before our
start, and because its id is remembered for as long as its time is valid. So the clock of another host alone decides nothing, and
the memory is bounded.
"""

import hmac
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Final

from sniproxy.streams.end_reason import Reason
from sniproxy.tunnel.epoch import UNKNOWN_EPOCH, stale_detail
from sniproxy.tunnel.preamble import (
    KEY_SIZE,
    SIGNATURE_SIZE,
    Preamble,
    PreambleError,
    SigningKey,
    WarmPreamble,
    parse,
    signature,
)

TIME_WINDOW_MS: Final = 60_000
"""How far the signer's clock may differ from ours."""
REPLAY_WINDOW_MS: Final = 2 * TIME_WINDOW_MS
"""How long a stream id is remembered. A header whose time is as far ahead as allowed stays valid for this long."""
MAX_REPLAYS: Final = 1 << 18
"""Streams remembered: 2,184 new ones per second for two minutes; some 50 MB when full."""
MIN_SHARE: Final = 16
"""However many networks have keys, each may have a sixteenth of what all have together."""

_NO_SECRET: Final = bytes(KEY_SIZE)
"""Used in place of an unknown key, so that the check takes as long as for a bad signature."""


def share_of(most: int, networks: int) -> int:
    """Return how much of `most` each of this many networks may have, so that none can take everything."""
    return max(most // max(networks, 1), most // MIN_SHARE, 1)


def check_hello(preamble: Preamble, server_name: str, digest: bytes) -> None:
    """Check that the preamble was signed for this ClientHello.

    Raises PreambleError (bad_signature).
    """
    if preamble.hello_digest is None or not hmac.compare_digest(preamble.hello_digest, digest):
        raise PreambleError(Reason.BAD_SIGNATURE, "the ClientHello is not the one that was signed for")
    if preamble.authority != server_name:
        raise PreambleError(Reason.BAD_SIGNATURE, "the ClientHello has another name than was signed")


class ReplayCache:
    """Remembers the ids of preambles for two minutes, up to a fixed number, and up to a share of it for each network.

    When it is full, it refuses new preambles instead of forgetting old ones. Only holders of a key can fill it, and forgetting
    would admit a captured header again during a flood.
    """

    __slots__ = ("_of", "_seen", "max_entries", "window_ms")

    def __init__(self, max_entries: int = MAX_REPLAYS, window_ms: int = REPLAY_WINDOW_MS) -> None:
        self.max_entries = max_entries
        self.window_ms = window_ms
        self._seen: OrderedDict[bytes, tuple[int, str]] = OrderedDict()  # in order of arrival
        self._of: Counter[str] = Counter()  # by network, of verified preambles

    def __len__(self) -> int:
        return len(self._seen)

    def largest(self) -> int:
        """Return how many are remembered of the network that has the most."""
        return max(self._of.values(), default=0)

    def add(self, seen: bytes, now_ms: int, *, network: str = "", share: int | None = None) -> None:
        """Remember `seen` for this network, which may have at most `share` of them.

        Raises PreambleError: replay if it is already remembered, overloaded if the cache or the network's share is full.
        """
        while self._seen and next(iter(self._seen.values()))[0] + self.window_ms < now_ms:
            _, (_, whose) = self._seen.popitem(last=False)
            self._of[whose] -= 1
            if not self._of[whose]:
                del self._of[whose]
        if seen in self._seen:
            raise PreambleError(Reason.REPLAY, "this stream and attempt were here before")
        for held, most, who in (
            (self._of[network], share, f" of network {network!r}"),
            (len(self), self.max_entries, ""),
        ):
            if most is not None and held >= most:
                raise PreambleError(Reason.OVERLOADED, f"{most} streams{who} within {self.window_ms} ms")
        self._seen[seen] = now_ms, network
        self._of[network] += 1


class PreambleVerifier:
    """Verifies the preambles that arrive at one gateway process of `network`.

    `keys` and `require_epoch` may be replaced at any time. `replays` may be shared by several verifiers.
    """

    __slots__ = ("_keys", "epoch", "network", "networks", "replays", "require_epoch")

    def __init__(
        self,
        keys: Mapping[str, SigningKey],
        network: str,
        replays: ReplayCache | None = None,
        *,
        epoch: bytes = UNKNOWN_EPOCH,
        require_epoch: bool = False,
    ) -> None:
        """Accept no preamble for an epoch other than `epoch`, and with `require_epoch` none without an epoch."""
        self.network = network
        self.replays = ReplayCache() if replays is None else replays
        self.epoch = epoch
        self.require_epoch = require_epoch
        self.keys = keys

    @property
    def keys(self) -> Mapping[str, SigningKey]:
        """The keys of all directions, by id."""
        return self._keys

    @keys.setter
    def keys(self, keys: Mapping[str, SigningKey]) -> None:
        self._keys = keys
        self.networks = len({key.from_network for key in keys.values() if key.to_network == self.network})
        """How many networks may open streams to this one."""

    def verify(self, header: bytes, *, addressee: str, now_ms: int) -> Preamble | WarmPreamble:
        """Verify a complete header and return its content.

        Args:
            header: exactly the bytes of the header, as many as `read_length` says.
            addressee: the id of the allocation or gateway record by which it came.
            now_ms: unix time in milliseconds.

        Raises:
            PreambleError: with the reason of the first check that failed: layout, key, signature, time, network and
                addressee, epoch, replay.
        """
        preamble = parse(header)
        direction = preamble.from_network, preamble.to_network
        key = self.keys.get(preamble.key_id)
        if key is not None and (key.from_network, key.to_network) != direction:
            key = None
        secret = _NO_SECRET if key is None else key.secret
        is_signed = hmac.compare_digest(signature(header, secret), header[-SIGNATURE_SIZE:])
        # The same answer for both, in the same time: an unverified peer learns nothing about our keys.
        told = Reason.BAD_SIGNATURE, "not signed with a key that is known here for these networks"
        if key is None:
            detail = f"no key {preamble.key_id!r} here for streams from {direction[0]!r} to {direction[1]!r}"
            raise PreambleError(Reason.NO_KEY, detail, told=told)
        if not is_signed:
            raise PreambleError(Reason.BAD_SIGNATURE, f"not signed with key {key.id!r}", told=told)
        skew_ms = preamble.time_ms - now_ms
        if abs(skew_ms) > TIME_WINDOW_MS:
            how = "ahead of" if skew_ms > 0 else "behind"
            detail = (
                f"the clock of the relay in {preamble.from_network!r} is {abs(skew_ms) / 1000:.1f} s {how} that of the "
                f"gateway in {self.network!r}; {TIME_WINDOW_MS // 1000} s are allowed"
            )
            raise PreambleError(Reason.CLOCK_SKEW, detail)
        if preamble.to_network != self.network:
            raise PreambleError(Reason.REPLAY, f"meant for network {preamble.to_network!r}")
        if preamble.addressee != addressee:
            raise PreambleError(Reason.REPLAY, f"meant for {preamble.addressee!r}, came by {addressee!r}")
        if preamble.epoch is None:
            if self.require_epoch:
                raise PreambleError(Reason.STALE_EPOCH, "signed without an epoch: gateway.require_epoch")
        elif not hmac.compare_digest(preamble.epoch, self.epoch):
            known = "no epoch yet" if preamble.epoch == UNKNOWN_EPOCH else "the epoch of another process"
            told = Reason.STALE_EPOCH, stale_detail(self.epoch, key.secret, preamble.once)
            raise PreambleError(Reason.STALE_EPOCH, f"signed for {known}", told=told)
        share = share_of(self.replays.max_entries, self.networks)
        self.replays.add(preamble.once, now_ms, network=preamble.from_network, share=share)
        return preamble
