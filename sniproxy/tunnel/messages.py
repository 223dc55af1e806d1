"""The control capsules between relay and gateway (PROTOCOL.md, section 5).

Values, with big-endian integers. Anything else is a CapsuleError:

    READY FINISHED DONE CONTINUED   empty
    OPENED                ms(4) port(2) address(4 or 16)       the dialled address, and how long dialling took
    REFUSED               n(1) reason(n) detail(0..200)        reason is [a-z_]+, detail is UTF-8
    PING PONG             token(8)                             a PONG repeats the token
    WAITING               seconds(2)
    RECEIVED              bytes(8)                             of this connection, counted from its first one
    OPEN                  a complete signed preamble           at most 1,024 bytes
"""

import ipaddress
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from sniproxy.tunnel.capsules import CapsuleError, CapsuleType, Control, header

MAX_DETAIL: Final = 200
"""Longest detail of a REFUSED, in bytes of UTF-8."""
MAX_OPEN: Final = 1024
"""Longest value of an OPEN: the longest preamble."""
TOKEN_SIZE: Final = 8


def _control(capsule_type: CapsuleType, value: bytes) -> bytes:
    return header(capsule_type, len(value)) + value


@dataclass(frozen=True, slots=True)
class _Bare:
    """A control capsule without a value."""

    type: ClassVar[CapsuleType]

    def pack(self) -> bytes:
        """Return the whole capsule."""
        return header(self.type, 0)

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Parse the value. CapsuleError unless it is empty."""
        if value:
            raise CapsuleError(f"{cls.type.name} of {len(value)} bytes")
        return cls()


class Ready(_Bare):
    """From the gateway: the preamble is verified. The gateway writes nothing before."""

    __slots__ = ()
    type = CapsuleType.READY


class Finished(_Bare):
    """From either side: your data is delivered, up to and including FINAL_DATA."""

    __slots__ = ()
    type = CapsuleType.FINISHED


class Done(_Bare):
    """From the relay: both directions are finished; close the connection."""

    __slots__ = ()
    type = CapsuleType.DONE


class Continued(_Bare):
    """From the relay: the rest of my DATA comes on the connection whose preamble continues this stream."""

    __slots__ = ()
    type = CapsuleType.CONTINUED


class Heartbeat(_Bare):
    """From either side, while it has nothing else to say: I am still here. Not answered."""

    __slots__ = ()
    type = CapsuleType.HEARTBEAT


_COUNT: Final = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Received:
    """From the gateway: this many bytes of the connection, counted from its first one, have left the TURN server."""

    type: ClassVar = CapsuleType.RECEIVED
    count: int

    def pack(self) -> bytes:
        """Return the whole capsule."""
        return _control(CapsuleType.RECEIVED, _COUNT.pack(self.count))

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Parse the value. CapsuleError if it has another length."""
        if len(value) != _COUNT.size:
            raise CapsuleError(f"RECEIVED of {len(value)} bytes")
        return cls(*_COUNT.unpack(value))


_SECONDS: Final = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class Waiting:
    """From the gateway: the service is asleep and is being started, which may take this long from now."""

    type: ClassVar = CapsuleType.WAITING
    seconds: int

    def pack(self) -> bytes:
        """Return the whole capsule. Seconds beyond 16 bits are written as the maximum."""
        return _control(CapsuleType.WAITING, _SECONDS.pack(min(max(self.seconds, 0), 0xFFFF)))

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Parse the value. CapsuleError if it has another length."""
        if len(value) != _SECONDS.size:
            raise CapsuleError(f"WAITING of {len(value)} bytes")
        return cls(*_SECONDS.unpack(value))


_OPENED: Final = struct.Struct(">IH")
_MAX_MS: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Opened:
    """From the gateway: the service is connected. Sent before the gateway's first DATA."""

    type: ClassVar = CapsuleType.OPENED
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    ms: int
    """How long the dial took, in milliseconds."""

    def pack(self) -> bytes:
        """Return the whole capsule. A dial time beyond 32 bits is written as the maximum."""
        value = _OPENED.pack(min(max(self.ms, 0), _MAX_MS), self.port) + self.address.packed
        return _control(CapsuleType.OPENED, value)

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Parse the value. CapsuleError if it has another length or port 0."""
        if len(value) not in (_OPENED.size + 4, _OPENED.size + 16):
            raise CapsuleError(f"OPENED of {len(value)} bytes")
        ms, port = _OPENED.unpack_from(value)
        if not port:
            raise CapsuleError("OPENED with port 0")
        return cls(ipaddress.ip_address(value[_OPENED.size :]), port, ms)


_REASON: Final = re.compile(r"[a-z_]{1,32}")


@dataclass(frozen=True, slots=True)
class Refused:
    """From the gateway: the stream is refused. The reason is a stream end reason, or one of a later version."""

    type: ClassVar = CapsuleType.REFUSED
    reason: str
    detail: str = ""

    def pack(self) -> bytes:
        """Return the whole capsule, with the detail cut to 200 bytes. ValueError if the reason is not [a-z_]{1,32}."""
        if not _REASON.fullmatch(self.reason):
            raise ValueError(f"not a reason: {self.reason!r}")
        detail = self.detail.encode("utf-8", "replace")[:MAX_DETAIL].decode("utf-8", "ignore").encode()
        reason = self.reason.encode()
        return _control(CapsuleType.REFUSED, bytes([len(reason)]) + reason + detail)

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Parse the value. CapsuleError if the lengths do not add up or it is not text."""
        size = value[0] if value else 0
        reason, detail = value[1 : 1 + size], value[1 + size :]
        if len(reason) != size or len(detail) > MAX_DETAIL:
            raise CapsuleError("REFUSED whose lengths do not add up")
        try:
            message = cls(reason.decode("ascii"), detail.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise CapsuleError("REFUSED that is not text") from error
        if not _REASON.fullmatch(message.reason):
            raise CapsuleError("REFUSED without a reason")
        return message


@dataclass(frozen=True, slots=True)
class _Pulse:
    """A liveness check of a warm connection. `token` is eight bytes, opaque to the gateway."""

    type: ClassVar[CapsuleType]
    token: bytes

    def pack(self) -> bytes:
        """Return the whole capsule. ValueError if the token is not eight bytes."""
        if len(self.token) != TOKEN_SIZE:
            raise ValueError(f"a token of {len(self.token)} bytes")
        return _control(self.type, self.token)

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Parse the value. CapsuleError if the token is not eight bytes."""
        if len(value) != TOKEN_SIZE:
            raise CapsuleError(f"{cls.type.name} of {len(value)} bytes")
        return cls(value)


class Ping(_Pulse):
    """From the relay: are you still there?"""

    __slots__ = ()
    type = CapsuleType.PING


class Pong(_Pulse):
    """From the gateway: yes. The token is that of the PING."""

    __slots__ = ()
    type = CapsuleType.PONG


@dataclass(frozen=True, slots=True)
class Open:
    """From the relay, on a warm connection: a client has come. `preamble` is the complete signed header of its stream."""

    type: ClassVar = CapsuleType.OPEN
    preamble: bytes

    def pack(self) -> bytes:
        """Return the whole capsule. ValueError if the header is longer than any preamble."""
        if len(self.preamble) > MAX_OPEN:
            raise ValueError(f"a preamble of {len(self.preamble)} bytes")
        return _control(CapsuleType.OPEN, self.preamble)

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Parse the value. CapsuleError if the header is longer than any preamble."""
        if len(value) > MAX_OPEN:
            raise CapsuleError(f"OPEN of {len(value)} bytes")
        return cls(value)


Message = Ready | Opened | Refused | Finished | Ping | Pong | Open | Done | Received | Continued | Waiting | Heartbeat

_PARSERS: Final[dict[CapsuleType, Callable[[bytes], Message]]] = {
    CapsuleType.READY: Ready.parse,
    CapsuleType.OPENED: Opened.parse,
    CapsuleType.REFUSED: Refused.parse,
    CapsuleType.FINISHED: Finished.parse,
    CapsuleType.PING: Ping.parse,
    CapsuleType.PONG: Pong.parse,
    CapsuleType.OPEN: Open.parse,
    CapsuleType.DONE: Done.parse,
    CapsuleType.RECEIVED: Received.parse,
    CapsuleType.CONTINUED: Continued.parse,
    CapsuleType.WAITING: Waiting.parse,
    CapsuleType.HEARTBEAT: Heartbeat.parse,
}


def parse_control(control: Control) -> Message:
    """Parse a control capsule. Raises CapsuleError if its value is not laid out as described above."""
    return _PARSERS[control.type](control.value)
