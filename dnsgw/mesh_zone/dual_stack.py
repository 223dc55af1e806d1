"""Answers the A and the AAAA question of one client from the same state of discovery.

libc sends the two questions about a name at once, in two packets. If discovery changes between them, the second is answered from
the same table as the first: when an IPv6-only relay is replaced by an IPv4-only one, the name must not seem to have no address.

Sans-IO: time comes as an argument, in seconds of any one clock.
"""

from collections import deque

from dnsgw.client_limits import Host
from dnsgw.mesh_zone.zone import Table
from dnsgw.message.question import HEADER_SIZE, BadQuery, scan
from dnsgw.message.reply import Answer

RECENT = 256  # last questions that are searched for pairs
PAIR_S = 0.05  # between two packets that were sent at once
_HALVES = {b"\0\x01": b"\0\x1c", b"\0\x1c": b"\0\x01"}  # A and AAAA


class DualStackConsistency:
    """Remembers which clients have asked for one half of a pair.

    The caller appends every question to `recent`, and calls `reply` while `open` is not empty.
    """

    __slots__ = ("_pair_s", "_until", "open", "recent")

    def __init__(self, pair_s: float = PAIR_S) -> None:
        """Start with no questions. `pair_s`: how far apart, in seconds, the halves of a pair may be."""
        self._pair_s = pair_s
        self.recent: deque[tuple[Host, bytes]] = deque(maxlen=RECENT)
        self.open: dict[tuple[Host, bytes], Table] = {}
        self._until = 0.0

    def keep(self, before: Table, now: float) -> None:
        """Let `before`, a table that has just been replaced, still answer the second half of pairs whose first half it answered."""
        pairs: dict[tuple[Host, bytes], set[bytes]] = {}
        for host, data in self.recent:
            stop = data.find(0, HEADER_SIZE) + 1
            qtype = data[stop : stop + 2]
            if qtype in _HALVES:
                pairs.setdefault((host, data[HEADER_SIZE:stop].lower()), set()).add(qtype)
        self.recent.clear()
        if not self.open or now >= self._until:
            self.open.clear()
            self._until = now + self._pair_s
        for (host, name), seen in pairs.items():
            if len(seen) == 1:
                self.open[host, name + _HALVES[seen.pop()]] = before

    def reply(self, data: bytes, host: Host, now: float, most: int) -> bytes | None:
        """Answer the second half of a pair from the first half's table, in at most `most` bytes; None: it is not one."""
        if now >= self._until:
            self.open.clear()
            return None
        stop = data.find(0, HEADER_SIZE) + 1
        table = self.open.pop((host, data[HEADER_SIZE:stop].lower() + data[stop : stop + 2]), None)
        if table is None:
            return None
        reply = table.answer_at_once(data)
        if reply is None:
            try:
                query = scan(data)
            except BadQuery:
                return None
            answer = table.decide(query)
            if isinstance(answer, Answer):
                reply = answer.reply(query, min(query.limit, most))
        return reply
