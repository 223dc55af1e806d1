"""Which capsule may come when, and when a framed stream is over, seen from one side.

TURN servers destroy both connections at the first FIN and drop what they had not sent yet, so between relay and gateway a TCP
FIN is never a message: each end is said in band, and confirmed.

    relay                                    gateway
      preamble, DATA (ClientHello) ─────────▶  checks the preamble
      ◀───────────────────────────────── READY
      ◀──────────────────────── OPENED/REFUSED  has dialled the service
      DATA … FINAL_DATA ────────────────────▶  delivers everything, sends FIN to the service
      ◀───────────────────────────── FINISHED
      ◀──────────────────── DATA … FINAL_DATA  (the two directions end in any order)
      FINISHED ─────────────────────────────▶
      DONE ─────────────────────────────────▶  closes the connection

A connection that ends before both have confirmed is a truncation.

A warm connection is kept ready before there is a stream: READY answers its preamble, PING is answered by PONG, and OPEN brings the
preamble of a stream, which goes on as above. A last PING goes with OPEN: the gateway answers it before it does anything else, so
that a connection that has died unnoticed costs as long as READY may take and not the stream.

      OPEN, DATA (ClientHello) ─────────────▶  checks the preamble, dials the service
      ◀──────────────────────── OPENED/REFUSED

Through a TURN server one connection must not be full in both directions at once: coturn (4.6.1 to 4.17.1) stops reading a side
while the other's buffer is full, and when that buffer has drained looks at the wrong one before it reads on. If both are full
at that moment, one direction stands still for ever (measured: bulk both ways never ends). So the relay keeps its own direction
nearly empty: the gateway says how much it has RECEIVED, and an upload that outgrows LIMIT_UNRECEIVED goes on over a second
connection, announced by CONTINUED, where nothing comes back.
"""

from enum import Enum

from sniproxy.tunnel.capsules import CapsuleError, CapsuleType

LIMIT_OPENED_S = 10.0
"""From READY to OPENED or REFUSED: the gateway may try several endpoints."""

LIMIT_WAITING_S = 120.0
"""How much longer at most, where the gateway says that a service is being woken (WAITING): a container on a new machine."""

LIMIT_DONE_S = 10.0
"""From the last FINISHED to the close: after that nothing is left to lose."""

LIMIT_REFUSED_S = 2.0
"""How long a gateway that has refused reads and discards, so that REFUSED arrives before the close."""


LIMIT_UNRECEIVED = 96 * 1024
"""Bytes from relay to gateway that may be in a TURN server's hands on a connection that carries both directions. coturn calls a
buffer full from 126 KiB on (192 KiB less one read of 64 KiB)."""

RECEIVED_INTERVAL = 32 * 1024
"""How often the gateway says what it has received: a stream whose client sends less than this never costs a capsule more."""


class Side(Enum):
    """Which end of the connection we are."""

    RELAY = "relay"
    GATEWAY = "gateway"


class StreamState:
    """The state of one framed stream. `received` and `sent` are told every capsule header in order."""

    __slots__ = (
        "_pings",
        "_side",
        "continued",
        "done",
        "final_received",
        "final_sent",
        "finished_received",
        "finished_sent",
        "opened",
        "ready",
        "refused",
        "warm",
    )

    def __init__(self, side: Side) -> None:
        self._side = side
        self.ready = self.opened = self.refused = False
        self.done = self.continued = False
        self.final_sent = self.final_received = False
        self.finished_sent = self.finished_received = False
        self.warm = False
        """Whether the connection is kept ready: no stream before OPEN."""
        self._pings = 0  # that have not been answered

    @property
    def complete(self) -> bool:
        """Both directions have ended and both sides have confirmed it: nothing can be lost any more."""
        return self.finished_sent and self.finished_received

    def sent(self, kind: CapsuleType) -> None:
        """Note what we send. A wrong order of ours is a defect, not an error of the peer.

        Raises:
            AssertionError: our own side breaks the rules.
        """
        error = self._note(kind, from_relay=self._side is Side.RELAY, by_us=True)
        if error:
            raise AssertionError(f"{self._side.value} sends {kind.name}: {error}")

    def received(self, kind: CapsuleType) -> None:
        """Note what the peer sent.

        Raises:
            CapsuleError: it may not come now.
        """
        error = self._note(kind, from_relay=self._side is Side.GATEWAY, by_us=False)
        if error:
            raise CapsuleError(f"{kind.name}: {error}")

    def end_elsewhere(self, *, by_us: bool) -> None:
        """Note that the relay's FINAL_DATA went over the second connection."""
        if by_us:
            self.final_sent = True
        else:
            self.final_received = True

    def _note(self, kind: CapsuleType, *, from_relay: bool, by_us: bool) -> str | None:
        """Say why `kind` may not be said now, or note that it was and return None."""
        if self.refused:
            return "after REFUSED"
        match kind:
            case CapsuleType.DATA | CapsuleType.FINAL_DATA:
                return self._note_data(final=kind is CapsuleType.FINAL_DATA, from_relay=from_relay, by_us=by_us)
            case CapsuleType.FINISHED:
                return self._note_finished(by_us=by_us)
            case CapsuleType.DONE if from_relay:
                self.done = True
                return None if self.complete else "before both FINISHED"
            case CapsuleType.CONTINUED if from_relay:
                ended = self.final_sent if by_us else self.final_received
                if not self.opened:  # nor on a second connection, which is never opened: there is no third one
                    return "before OPENED"
                error = "after FINAL_DATA" if ended else "a second time" if self.continued else None
                self.continued = True
                return error
            case CapsuleType.RECEIVED if not from_relay:
                return None if self.opened else "before OPENED"
            case CapsuleType.PING | CapsuleType.OPEN if from_relay:
                if not (self.warm and self.ready):
                    return "on a connection that is not warm"
                if kind is CapsuleType.OPEN:
                    self.warm = False
                else:
                    self._pings += 1
                return None
            case CapsuleType.PONG if not from_relay:
                if not self._pings:
                    return "without PING"
                self._pings -= 1
                return None
            case CapsuleType.WAITING if not from_relay:
                return "before READY" if not self.ready or self.warm else "after OPENED" if self.opened else None
            case CapsuleType.READY if not from_relay:
                error, self.ready = "a second time" if self.ready else None, True
                return error
            case CapsuleType.OPENED | CapsuleType.REFUSED if not from_relay:
                if self.opened:
                    return "after OPENED"
                if kind is CapsuleType.REFUSED:
                    self.refused = True
                    return None
                self.opened = True
                return "before READY" if not self.ready else "before OPEN" if self.warm else None
        return f"not said by a {'relay' if from_relay else 'gateway'} on this stream"

    def _note_data(self, *, final: bool, from_relay: bool, by_us: bool) -> str | None:
        if not from_relay and not self.opened:
            return "before OPENED"
        if self.warm:
            return "before OPEN"
        if self.final_sent if by_us else self.final_received:
            return "after FINAL_DATA"
        if from_relay and self.continued:
            return "after CONTINUED"
        if final and by_us:
            self.final_sent = True
        elif final:
            self.final_received = True
        return None

    def _note_finished(self, *, by_us: bool) -> str | None:
        confirmed, already = (
            (self.final_received, self.finished_sent) if by_us else (self.final_sent, self.finished_received)
        )
        if not confirmed:
            return "without FINAL_DATA"
        if already:
            return "a second time"
        if by_us:
            self.finished_sent = True
        else:
            self.finished_received = True
        return None
