"""The order of capsules, and the end of a stream (PROTOCOL.md, sections 6 to 8).

TURN servers destroy both connections at the first FIN and drop what they have not sent yet. So between relay and gateway a TCP FIN
never means an end: each end is signalled in band, and confirmed.

    relay                                    gateway
      preamble, DATA (ClientHello) ─────────▶  checks the preamble
      ◀───────────────────────────────── READY
      ◀──────────────────────── OPENED/REFUSED  has dialled the service
      DATA … FINAL_DATA ────────────────────▶  delivers everything, sends FIN to the service
      ◀───────────────────────────── FINISHED
      ◀──────────────────── DATA … FINAL_DATA  (the two directions end in any order)
      FINISHED ─────────────────────────────▶
      DONE ─────────────────────────────────▶  ends the connection

A stream whose connection ends before both have confirmed is truncated.

There are three state machines: one for the opening, and one for each direction (up is from relay to gateway). A capsule is an event
in every machine that knows it, and is allowed only if all of these have a transition for it. The tables below define them; this is
their content (a test compares it):

    opening
      greeted   relay:   DATA, FINAL_DATA
                gateway: FINISHED, READY → ready, REFUSED → refused
      warming   gateway: READY → warm, REFUSED → refused
      warm      relay:   PING, OPEN → ready
                gateway: PONG, REFUSED → refused
      ready     relay:   DATA, FINAL_DATA
                gateway: PONG, FINISHED, WAITING, OPENED → opened, REFUSED → refused
      opened    relay:   DATA, FINAL_DATA, CONTINUED, FINISHED, DONE, HEARTBEAT
                gateway: DATA, FINAL_DATA, PONG, RECEIVED, FINISHED, HEARTBEAT
      refused   nothing
    up
      flowing   relay:   DATA, CONTINUED → moved, FINAL_DATA → ended
      moved     relay:   FINAL_DATA on the second connection → ended
      ended     gateway: FINISHED → finished
      finished  relay:   DONE → over
      over      relay:   DONE
    down
      flowing   gateway: DATA, FINAL_DATA → ended
      ended     relay:   FINISHED → finished
      finished  relay:   DONE → over
      over      relay:   DONE

In addition, each PONG answers one PING. A warm connection is kept ready before there is a stream: READY answers its preamble, PONG
answers PING, and OPEN contains the preamble of a stream. A last PING is sent with OPEN. The gateway answers it before it does
anything else, so a connection that died unnoticed costs as long as READY may take, but not the stream.

      PING, OPEN, DATA (ClientHello) ───────▶  checks the preamble, dials the service
      ◀────────────────────────────────── PONG
      ◀──────────────────────── OPENED/REFUSED

Through a TURN server, one connection must not be full in both directions at once: coturn (4.6.1 to 4.17.1) stops reading from a
side while the buffer towards the other is full, and once that has drained, checks the wrong buffer before it resumes. If both are
full at that moment, one direction stalls for ever (measured: bulk both ways never ends). So the relay keeps its own direction
nearly empty: the gateway reports how much it has RECEIVED, and an upload that exceeds LIMIT_UNRECEIVED moves to a second
connection, announced by CONTINUED, which carries nothing in the other direction.
"""

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Final, NamedTuple, TypeVar

from sniproxy.tunnel.capsules import CapsuleError, CapsuleType

LIMIT_OPENED_S = 10.0
"""From READY to OPENED or REFUSED: the gateway may try several endpoints."""

LIMIT_WAITING_S = 120.0
"""The most that a gateway can add to this while a service is being started (WAITING): time for a container on a new machine."""

LIMIT_DONE_S = 10.0
"""From the last FINISHED to the close. Nothing can be lost any more by then."""

LIMIT_REFUSED_S = 2.0
"""How long a gateway reads and discards after REFUSED, so that REFUSED arrives before the close."""


LIMIT_UNRECEIVED = 96 * 1024
"""Bytes from relay to gateway that a TURN server may hold on a connection that carries both directions. coturn considers a buffer
full from 126 KiB on (192 KiB less one read of 64 KiB)."""

RECEIVED_INTERVAL = 32 * 1024
"""How often the gateway reports what it has received. A stream whose client sends less than this needs no such capsule."""


class Side(Enum):
    """The side of the connection."""

    RELAY = "relay"
    GATEWAY = "gateway"


class Opening(StrEnum):
    """The states of the opening."""

    GREETED = "greeted"
    """The preamble has been sent: that of a stream, or that of a second connection, which is never opened."""
    WARMING = "warming"
    """The preamble of a warm connection has been sent."""
    WARM = "warm"
    READY = "ready"
    OPENED = "opened"
    REFUSED = "refused"


class Direction(StrEnum):
    """The states of one direction."""

    FLOWING = "flowing"
    MOVED = "moved"
    """The rest is sent over the second connection."""
    ENDED = "ended"
    FINISHED = "finished"
    """The receiver has confirmed that everything is delivered."""
    OVER = "over"


class Elsewhere(Enum):
    """Events on the second connection that count for the first."""

    FINAL_DATA = "final_data"


Event = tuple[Side, CapsuleType | Elsewhere]
"""The sender, and what it sends."""

State = TypeVar("State", Opening, Direction)

Machine = Mapping[State, Mapping[Event, State]]
"""The transitions by state and event."""

ERRORS: Final[Mapping[Opening | Direction, str]] = {
    Opening.GREETED: "before READY",
    Opening.WARMING: "before READY",
    Opening.WARM: "before OPEN",
    Opening.READY: "before OPENED",
    Opening.OPENED: "after OPENED",
    Opening.REFUSED: "after REFUSED",
    Direction.FLOWING: "before FINAL_DATA",
    Direction.MOVED: "after CONTINUED",
    Direction.ENDED: "after FINAL_DATA",
    Direction.FINISHED: "after FINISHED",
    Direction.OVER: "after DONE",
}
"""Error texts for a capsule that has no transition in a state."""

_R, _G, _T = Side.RELAY, Side.GATEWAY, CapsuleType

OPENING: Final[Machine[Opening]] = {
    Opening.GREETED: {
        (_R, _T.DATA): Opening.GREETED,
        (_R, _T.FINAL_DATA): Opening.GREETED,
        (_G, _T.FINISHED): Opening.GREETED,
        (_G, _T.READY): Opening.READY,
        (_G, _T.REFUSED): Opening.REFUSED,
    },
    Opening.WARMING: {
        (_G, _T.READY): Opening.WARM,
        (_G, _T.REFUSED): Opening.REFUSED,
    },
    Opening.WARM: {
        (_R, _T.PING): Opening.WARM,
        (_R, _T.OPEN): Opening.READY,
        (_G, _T.PONG): Opening.WARM,
        (_G, _T.REFUSED): Opening.REFUSED,
    },
    Opening.READY: {
        (_R, _T.DATA): Opening.READY,
        (_R, _T.FINAL_DATA): Opening.READY,
        (_G, _T.PONG): Opening.READY,
        (_G, _T.FINISHED): Opening.READY,
        (_G, _T.WAITING): Opening.READY,
        (_G, _T.OPENED): Opening.OPENED,
        (_G, _T.REFUSED): Opening.REFUSED,
    },
    Opening.OPENED: {
        (_R, _T.DATA): Opening.OPENED,
        (_R, _T.FINAL_DATA): Opening.OPENED,
        (_R, _T.CONTINUED): Opening.OPENED,
        (_R, _T.FINISHED): Opening.OPENED,
        (_R, _T.DONE): Opening.OPENED,
        (_R, _T.HEARTBEAT): Opening.OPENED,
        (_G, _T.DATA): Opening.OPENED,
        (_G, _T.FINAL_DATA): Opening.OPENED,
        (_G, _T.PONG): Opening.OPENED,
        (_G, _T.RECEIVED): Opening.OPENED,
        (_G, _T.FINISHED): Opening.OPENED,
        (_G, _T.HEARTBEAT): Opening.OPENED,
    },
    Opening.REFUSED: {},
}

UP: Final[Machine[Direction]] = {
    Direction.FLOWING: {
        (_R, _T.DATA): Direction.FLOWING,
        (_R, _T.CONTINUED): Direction.MOVED,
        (_R, _T.FINAL_DATA): Direction.ENDED,
    },
    Direction.MOVED: {(_R, Elsewhere.FINAL_DATA): Direction.ENDED},
    Direction.ENDED: {(_G, _T.FINISHED): Direction.FINISHED},
    Direction.FINISHED: {(_R, _T.DONE): Direction.OVER},
    Direction.OVER: {(_R, _T.DONE): Direction.OVER},
}

DOWN: Final[Machine[Direction]] = {
    Direction.FLOWING: {
        (_G, _T.DATA): Direction.FLOWING,
        (_G, _T.FINAL_DATA): Direction.ENDED,
    },
    Direction.ENDED: {(_R, _T.FINISHED): Direction.FINISHED},
    Direction.FINISHED: {(_R, _T.DONE): Direction.OVER},
    Direction.OVER: {(_R, _T.DONE): Direction.OVER},
}

TRANSITIONS: Final[Mapping[str, Machine[Opening] | Machine[Direction]]] = {"opening": OPENING, "up": UP, "down": DOWN}
"""The three machines."""


class _Rule(NamedTuple):
    """The transitions of one capsule from one side in each machine. A machine that does not know the capsule keeps its state."""

    opening: Mapping[Opening, Opening]
    up: Mapping[Direction, Direction]
    down: Mapping[Direction, Direction]


def _leads(machine: Machine[State], event: Event) -> dict[State, State]:
    known = {state: events[event] for state, events in machine.items() if event in events}
    return known or {state: state for state in machine}


_EVENTS: Final = {event for machine in TRANSITIONS.values() for events in machine.values() for event in events}

# Inverted, so that each capsule needs one look-up in each machine.
_RULES: Final[Mapping[Side, Mapping[CapsuleType, _Rule]]] = {
    side: {
        kind: _Rule(_leads(OPENING, (side, kind)), _leads(UP, (side, kind)), _leads(DOWN, (side, kind)))
        for kind in CapsuleType
        if (side, kind) in _EVENTS
    }
    for side in Side
}
_GOING: Final = frozenset({Direction.FLOWING, Direction.MOVED})
_CONFIRMED: Final = frozenset({Direction.FINISHED, Direction.OVER})
_PING: Final = CapsuleType.PING
_PONG: Final = CapsuleType.PONG


class StreamState:
    """The state of one stream. `received` and `sent` must be called for every capsule header, in order."""

    __slots__ = (
        "_down",
        "_hears",
        "_opening",
        "_pings",
        "_says",
        "_side",
        "_up",
        "complete",
        "done",
        "final_received",
        "final_sent",
        "finished_received",
        "finished_sent",
    )

    def __init__(self, side: Side) -> None:
        self._side = side
        self._says = _RULES[side]
        self._hears = _RULES[Side.GATEWAY if side is Side.RELAY else Side.RELAY]
        self._opening = Opening.GREETED
        self._up = self._down = Direction.FLOWING
        self._pings = 0  # not answered yet
        # Read for each capsule but rarely changed, so these are attributes and not properties.
        self.final_sent = self.final_received = False
        """Whether our direction has ended, and the peer's."""
        self.finished_sent = self.finished_received = False
        """Whether we have confirmed the peer's end, and the peer has confirmed ours."""
        self.complete = False
        """Both directions have ended and both sides have confirmed it: nothing can be lost any more."""
        self.done = False
        """The relay has sent DONE."""

    @property
    def warm(self) -> bool:
        """Whether the connection is warm: it has no stream before OPEN. To be set before READY."""
        return self._opening in (Opening.WARMING, Opening.WARM)

    @warm.setter
    def warm(self, warm: bool) -> None:
        assert self._opening in (Opening.GREETED, Opening.WARMING), f"already {self._opening}"
        self._opening = Opening.WARMING if warm else Opening.GREETED

    @property
    def ready(self) -> bool:
        """Whether the gateway has sent READY."""
        return self._opening in (Opening.WARM, Opening.READY, Opening.OPENED)

    @property
    def opened(self) -> bool:
        """Whether the gateway has sent OPENED."""
        return self._opening is Opening.OPENED

    @property
    def refused(self) -> bool:
        """Whether the gateway has sent REFUSED."""
        return self._opening is Opening.REFUSED

    def sent(self, kind: CapsuleType) -> None:
        """Note a capsule that we send. A wrong order is a bug on our side.

        Raises:
            AssertionError: the capsule is not allowed now.
        """
        error = self._note(self._says, kind)
        if error:
            raise AssertionError(f"{self._side.value} sends {kind.name}: {error}")

    def received(self, kind: CapsuleType) -> None:
        """Note a capsule from the peer.

        Raises:
            CapsuleError: it is not allowed now.
        """
        error = self._note(self._hears, kind)
        if error:
            raise CapsuleError(f"{kind.name}: {error}")

    def end_elsewhere(self) -> None:
        """Note that the relay's FINAL_DATA was sent over the second connection."""
        self._turn(UP[self._up][_R, Elsewhere.FINAL_DATA], self._down)

    def _note(self, rules: Mapping[CapsuleType, _Rule], kind: CapsuleType) -> str | None:
        """Make the transitions of `kind` and return None, or make none and return the error."""
        rule = rules.get(kind)
        if rule is None:
            return f"not said by a {'relay' if rules is _RULES[Side.RELAY] else 'gateway'}"
        opening, up, down = rule.opening.get(self._opening), rule.up.get(self._up), rule.down.get(self._down)
        if opening is None:
            return ERRORS[self._opening]
        if up is None:
            return ERRORS[self._up]
        if down is None:
            return ERRORS[self._down]
        if kind is _PONG:
            if not self._pings:
                return "without PING"
            self._pings -= 1
        elif kind is _PING:
            self._pings += 1
        self._opening = opening
        if up is not self._up or down is not self._down:
            self._turn(up, down)
        return None

    def _turn(self, up: Direction, down: Direction) -> None:
        """Set the states of both directions."""
        self._up, self._down = up, down
        ours, theirs = (up, down) if self._side is Side.RELAY else (down, up)
        self.final_sent, self.final_received = ours not in _GOING, theirs not in _GOING
        self.finished_received, self.finished_sent = ours in _CONFIRMED, theirs in _CONFIRMED
        self.complete = self.finished_received and self.finished_sent
        self.done = up is Direction.OVER
