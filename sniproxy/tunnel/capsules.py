"""Capsules: the framed units that relay and gateway exchange after the preamble (PROTOCOL.md, section 5).

A capsule is `type varint, length varint, value` (RFC 9297 section 3.2, varints as in RFC 9000 section 16). We write both varints
in their four-byte form, so that a header always has eight bytes and a receiver can read exactly these and splice the rest. We
read any form. DATA and FINAL_DATA have the code points of connect-tcp and are streamed: this module never holds a payload. All
other capsules are control capsules: small, and returned whole.

The content of control capsules is in `sniproxy.tunnel.messages`, the order of capsules in `sniproxy.tunnel.state`.
"""

import enum
import struct
from typing import ClassVar, Final, NamedTuple

from sniproxy.streams.end_reason import Reason

MAX_PAYLOAD: Final = (1 << 30) - 1
"""Largest length of a four-byte varint, and the largest that we accept for a DATA capsule."""
MAX_CONTROL: Final = 4096
"""Largest value of a control capsule: four times the largest in use (OPEN)."""
MAX_UNKNOWN: Final = 65536
"""Largest value of a capsule of unknown type. These are skipped, so that later versions can add types."""
HEADER_SIZE: Final = 8
"""Size of the headers that we write."""
_MAX_HEADER: Final = 16

_FOUR_BYTES: Final = 0x8000_0000
_HEADER: Final = struct.Struct(">II")


class CapsuleType(enum.IntEnum):
    """The capsule types of this version."""

    DATA = 0x2028D7F0
    FINAL_DATA = 0x2028D7F1
    READY = 0x20637200
    OPENED = 0x20637201
    REFUSED = 0x20637202
    FINISHED = 0x20637203
    PING = 0x20637204
    PONG = 0x20637205
    OPEN = 0x20637206
    DONE = 0x20637207
    RECEIVED = 0x20637208
    CONTINUED = 0x20637209
    WAITING = 0x2063720A
    HEARTBEAT = 0x2063720B


class CapsuleError(ValueError):
    """The peer violated the protocol: its bytes are not capsules as described above, or not allowed now."""

    reason: ClassVar = Reason.PROTOCOL_ERROR


class CapsuleFlood(CapsuleError):
    """The peer sent allowed capsules, but far more of them than any honest peer."""

    reason: ClassVar = Reason.FLOOD


class Header(NamedTuple):
    """The start of a DATA or FINAL_DATA capsule. `length` bytes of payload follow, as Payload events or spliced."""

    type: CapsuleType
    length: int


class Payload(NamedTuple):
    """A piece of the current payload, never empty. A view of the bytes that were fed, without a copy."""

    data: memoryview


class Control(NamedTuple):
    """A complete control capsule of a known type, with its value not parsed yet."""

    type: CapsuleType
    value: bytes


Event = Header | Payload | Control

_DATA_TYPES: Final[dict[int, CapsuleType]] = {int(t): t for t in (CapsuleType.DATA, CapsuleType.FINAL_DATA)}
_WRITTEN_DATA_TYPES: Final = {_FOUR_BYTES | number: kind for number, kind in _DATA_TYPES.items()}
_CONTROL_TYPES: Final[dict[int, CapsuleType]] = {int(t): t for t in CapsuleType if t not in _DATA_TYPES}


def header(capsule_type: int, length: int) -> bytes:
    """Return the eight-byte header of a capsule with `length` bytes of value. ValueError if either is over 2^30-1."""
    if capsule_type >> 30 or length >> 30:
        raise ValueError(f"a capsule of type {capsule_type:#x} and length {length} does not fit four-byte varints")
    return _HEADER.pack(_FOUR_BYTES | capsule_type, _FOUR_BYTES | length)


def _parse_header(data: bytes | bytearray | memoryview, at: int, end: int) -> tuple[int, int, int] | None:
    """Return type, length and the offset after the header at `at`, None if the header is not complete before `end`."""
    values = []
    for _ in range(2):
        if at >= end:
            return None
        size = 1 << (data[at] >> 6)
        if at + size > end:
            return None
        values.append(int.from_bytes(data[at : at + size], "big") & ((1 << (8 * size - 2)) - 1))
        at += size
    return values[0], values[1], at


class _Inside(enum.Enum):
    """The kind of the bytes up to the end of the current capsule."""

    PAYLOAD = enum.auto()
    CONTROL = enum.auto()
    UNKNOWN = enum.auto()


class CapsuleReader:
    """Turns received bytes into events, however they are split.

    There are two ways to use it, which may be mixed. Feed everything: `feed` all bytes that arrive. Or splice: read a header
    (`header_bytes_wanted`), feed it, move `payload_left` bytes by other means (os.splice), and report them with `skip_payload`.
    """

    __slots__ = ("_control", "_control_type", "_error", "_held", "_inside", "_left", "unknown")

    def __init__(self) -> None:
        self._held = bytearray()  # the part of a header received so far, under 16 bytes
        self._control = bytearray()  # the part of a control value received so far, under MAX_CONTROL
        self._control_type = CapsuleType.READY
        self._inside = _Inside.PAYLOAD
        self._left = 0  # bytes of the current capsule still to come
        self._error: CapsuleError | None = None
        self.unknown = 0
        """Capsules of unknown types so far. They are skipped without events."""

    @property
    def payload_left(self) -> int:
        """Return how many bytes of the current DATA or FINAL_DATA capsule are still to come."""
        return self._left if self._inside is _Inside.PAYLOAD else 0

    @property
    def at_boundary(self) -> bool:
        """Whether the bytes so far end exactly at the end of a capsule."""
        return not self._left and not self._held

    @property
    def header_bytes_needed(self) -> int:
        """Return how many bytes must still come, at least, before the next header is complete; 0 inside a capsule.

        Reading exactly this many never waits for bytes that need not come, and never takes a byte of payload.
        """
        if self._left:
            return 0
        held = self._held
        if not held:
            return 2
        type_size = 1 << (held[0] >> 6)
        if len(held) <= type_size:
            return type_size + 1 - len(held)
        return type_size + (1 << (held[type_size] >> 6)) - len(held)

    @property
    def header_bytes_wanted(self) -> int:
        """Return the limit for a read that may return fewer bytes; 0 inside a capsule.

        With headers from our own writers it is exactly the rest of the header. If a peer writes shorter varints, the read may
        include some payload, which then becomes a Payload event.
        """
        return 0 if self._left else max(HEADER_SIZE - len(self._held), self.header_bytes_needed)

    def skip_payload(self, count: int) -> None:
        """Note that `count` bytes of payload were moved without this reader. ValueError if that is more than is left."""
        if not 0 <= count <= self.payload_left:
            raise ValueError(f"{count} bytes moved of a payload of which {self.payload_left} are left")
        self._left -= count

    def feed(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Return the events that `data` completes, in order. Raises as `take`."""
        return self.take(data, len(data))[0]

    def take(self, data: bytes | bytearray | memoryview, most: int) -> tuple[list[Event], int]:
        """Return the events of up to `most` capsules, in order, and how many bytes of `data` were used.

        The caller passes the rest again later, so a read that is full of tiny capsules is handled in pieces.

        Raises CapsuleError, and again for every later call, because nothing after an error can be trusted.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._take(data, most)
        except CapsuleError as error:
            self._error = error
            raise

    def _take(self, data: bytes | bytearray | memoryview, most: int) -> tuple[list[Event], int]:
        events: list[Event] = []
        view = memoryview(data)
        at, end = 0, len(view)
        begun = 0
        while at < end:
            if self._left:
                piece = view[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                if self._inside is _Inside.PAYLOAD:
                    events.append(Payload(piece))
                elif self._inside is _Inside.CONTROL:
                    self._control += piece
                    if not self._left:
                        events.append(Control(self._control_type, bytes(self._control)))
                        self._control.clear()
                continue
            if begun >= most:
                break
            # Data with a header as we write it: the one case that must be fast.
            if end - at >= HEADER_SIZE and not self._held:
                first, second = _HEADER.unpack_from(view, at)
                kind = _WRITTEN_DATA_TYPES.get(first)
                if kind is not None and second >> 30 == 2:
                    at += HEADER_SIZE
                    self._inside = _Inside.PAYLOAD
                    self._left = length = second & MAX_PAYLOAD
                    events.append(Header(kind, length))
                    begun += 1
                    continue
            held = len(self._held)
            self._held += view[at : at + _MAX_HEADER - held]
            parsed = _parse_header(self._held, 0, len(self._held))
            if parsed is None:
                at = end  # a header has at most sixteen bytes, so all of `data` is in `_held` now
                break
            at += parsed[2] - held
            self._held.clear()
            self._begin(parsed[0], parsed[1], events)
            begun += 1
        return events, at

    def _begin(self, number: int, length: int, events: list[Event]) -> None:
        """Begin the capsule whose header was just read."""
        kind = _DATA_TYPES.get(number)
        if kind is not None:
            if length > MAX_PAYLOAD:
                raise CapsuleError(f"{kind.name} of {length} bytes")
            self._inside, self._left = _Inside.PAYLOAD, length
            events.append(Header(kind, length))
            return
        kind = _CONTROL_TYPES.get(number)
        if kind is None:
            if length > MAX_UNKNOWN:
                raise CapsuleError(f"capsule of unknown type {number:#x} with {length} bytes")
            self._inside, self._left = _Inside.UNKNOWN, length
            self.unknown += 1
            return
        if length > MAX_CONTROL:
            raise CapsuleError(f"{kind.name} of {length} bytes")
        if length:
            self._inside, self._left, self._control_type = _Inside.CONTROL, length, kind
        else:
            events.append(Control(kind, b""))
