"""Who answers for an imported name where upstream has precedence (`prefer: local`): we or upstream.

There is one verdict for all types of a name: a name that has an A record upstream but no AAAA must not get our AAAA, nor the
other way round. The name is ours only if upstream has neither address: many servers answer NXDOMAIN for a type that a name lacks.
A verdict is valid for the TTL of our answers.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Protocol, TypeAlias

from dnsgw.message.question import Qtype
from dnsgw.message.reply import Presence, presence
from dnsgw.pending_query import PendingQuery
from dnsgw.two_generation_cache import TwoGenerationCache
from dnsgw.upstream.exchange import Failure
from dnsgw.upstream.resolver import UpstreamReply

MAX_VERDICTS = 4096
ADDRESS_TYPES = (Qtype.A, Qtype.AAAA)

Then: TypeAlias = Callable[[PendingQuery, UpstreamReply | Failure], None]


class Owner(Enum):
    """Which side answers for the name."""

    OURS = "ours"
    UPSTREAM = "upstream"
    UNDECIDED = "undecided"
    """Upstream gave no usable answer."""


Settled: TypeAlias = Callable[[PendingQuery, Owner, UpstreamReply | Failure | None], None]
"""Called with the verdict, and with upstream's answer to the question itself if it was asked."""


class Ask(Protocol):
    """Asks upstream."""

    def __call__(self, asked: PendingQuery, then: Then, qtype: int | None = None) -> None:
        """Ask the question itself, or the same with another type. Answers older than a verdict's lifetime are not used."""


class Precedence:
    """The verdicts of one resolver."""

    def __init__(self, ask: Ask, now: Callable[[], float], ttl_s: int) -> None:
        """Ask upstream with `ask`; a verdict is valid for `ttl_s`, on the clock `now`."""
        self._ask = ask
        self._now = now
        self.ttl_s = ttl_s
        self._verdicts: TwoGenerationCache[tuple[float, Owner]] = TwoGenerationCache(MAX_VERDICTS)

    def forget(self) -> None:
        """Drop all verdicts."""
        self._verdicts = TwoGenerationCache(MAX_VERDICTS)

    def settle(self, asked: PendingQuery, then: Settled) -> None:
        """Decide who answers for the name that was asked for, and call `then`, now or later."""
        until, owner = self._verdicts.get(asked.query.name) or (0.0, Owner.UNDECIDED)
        known = self._now() < until
        if known and owner is Owner.OURS:
            then(asked, Owner.OURS, None)
        elif known or asked.query.qtype in ADDRESS_TYPES:
            self._ask(asked, partial(self._heard, then, known))
        else:
            self._probe(then, ADDRESS_TYPES, None, asked)

    def _heard(self, then: Settled, known: bool, asked: PendingQuery, result: UpstreamReply | Failure) -> None:
        """Take upstream's answer to the question itself. `known`: a valid verdict says that the name is upstream's."""
        said = _said(result)
        if said is Presence.NXDOMAIN or (said is Presence.NODATA and not known):
            self._probe(then, tuple(qtype for qtype in ADDRESS_TYPES if qtype != asked.query.qtype), result, asked)
        elif said is Presence.DATA:
            self._decide(then, asked, Owner.UPSTREAM, result)
        else:
            then(asked, Owner.UPSTREAM, result)

    def _probe(
        self, then: Settled, types: tuple[Qtype, ...], kept: UpstreamReply | Failure | None, asked: PendingQuery
    ) -> None:
        """Ask for the next of these types: if upstream has none of them, the name is ours.

        `kept` is upstream's answer to the question itself, if it was asked.
        """
        if types:
            self._ask(asked, partial(self._probed, then, types[1:], kept), types[0])
        else:
            self._decide(then, asked, Owner.OURS)

    def _probed(
        self,
        then: Settled,
        types: tuple[Qtype, ...],
        kept: UpstreamReply | Failure | None,
        asked: PendingQuery,
        result: UpstreamReply | Failure,
    ) -> None:
        """Take upstream's answer for an address type that was not asked for; `types` are to be asked for next."""
        said = _said(result)
        if said is Presence.FAILED:
            then(asked, Owner.UNDECIDED, kept)
        elif said is Presence.DATA:
            if isinstance(kept, UpstreamReply) and _said(kept) is Presence.NXDOMAIN:
                kept = kept.as_nodata()  # the name exists, whatever upstream says of this type
            self._decide(then, asked, Owner.UPSTREAM, kept)
        else:
            self._probe(then, types, kept, asked)

    def _decide(
        self, then: Settled, asked: PendingQuery, owner: Owner, heard: UpstreamReply | Failure | None = None
    ) -> None:
        self._verdicts[asked.query.name] = (self._now() + self.ttl_s, owner)
        then(asked, owner, heard)


def _said(result: UpstreamReply | Failure) -> Presence:
    return presence(result.wire) if isinstance(result, UpstreamReply) else Presence.FAILED
