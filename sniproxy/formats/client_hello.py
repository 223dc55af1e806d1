"""Parses the ClientHello: reassembles it from TLS records and reads the server name that the client asks for.

Relay and server must see the same name, so this parser is as strict as a careful TLS server: anything that two parsers could read
differently is refused, as soon as the bytes show it. It works in linear time over any number of records and segments, and never
changes a byte: everything it was fed is in `raw`, to be forwarded unchanged.

Section numbers refer to RFC 8446 unless another RFC is named.
"""

import enum
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from discovery.model.names import BadName, normalise
from sniproxy.formats.other_protocols import LONGEST_START, recognise
from sniproxy.formats.tls_alert import AlertDescription

DEFAULT_MAX_HELLO_BYTES: Final = 65536
"""Session tickets with client certificates make hellos of 20 KiB and more. Go's crypto/tls has the same limit of 64 KiB."""
MAX_RECORD: Final = 16384 + 256
"""Largest record length in TLS 1.3 (section 5.2). Plaintext records are limited to 16,384, but servers accept more."""

MAX_RECORD_HEADERS: Final = 65536
"""Bytes of record headers in one ClientHello, those of 13,107 records. Far more than any client sends; bounds the memory."""

_RECORD_HEADER: Final = 5
_MESSAGE_HEADER: Final = 4
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_RANDOM: Final = 32
_MAX_SESSION_ID: Final = 32
_HOST_NAME: Final = 0
_SERVER_NAME: Final = 0  # RFC 6066 section 3
_ALPN: Final = 16  # RFC 7301 section 3.1
_SUPPORTED_VERSIONS: Final = 43  # section 4.2.1
_SSL_3_0: Final = 0x0300
_ECH: Final = 0xFE0D  # encrypted_client_hello, RFC 9849

# The last label of an address, in any spelling that a resolver might take for an address (10.0.0.5, 010.1, 0x7f.1).
# No DNS name ends like this: there is no such top-level domain.
_ENDS_IN_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


class HelloReason(enum.StrEnum):
    """Why a ClientHello is refused; each is a stream end reason."""

    NOT_TLS = "not_tls"
    BAD_HELLO = "bad_hello"
    NO_SNI = "no_sni"
    BAD_NAME = "bad_name"


_ALERTS: Final = {
    HelloReason.BAD_HELLO: AlertDescription.DECODE_ERROR,
    HelloReason.NO_SNI: AlertDescription.UNRECOGNIZED_NAME,
    HelloReason.BAD_NAME: AlertDescription.UNRECOGNIZED_NAME,
}


class HelloError(ValueError):
    """Bytes that are not a ClientHello, or a ClientHello that cannot be routed. `detail` has no raw bytes from the peer.

    `is_probe`: no client sends this, only health checks do.
    """

    def __init__(self, reason: HelloReason, detail: str, *, is_probe: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.is_probe = is_probe

    @property
    def alert(self) -> AlertDescription | None:
        """Return the alert to refuse with, None for clients that do not speak TLS."""
        return _ALERTS.get(self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a relay needs to know of a ClientHello."""

    server_name: str
    """The validated name, in lower case and without trailing dot."""
    raw_name: bytes
    """The name as it was sent."""
    digest: bytes
    """SHA-256 of the reassembled handshake message, from its type byte on."""
    alpn: tuple[bytes, ...]
    versions: tuple[int, ...]
    """TLS versions that the client offers, without GREASE."""
    ech: bool
    """Whether there is an encrypted_client_hello extension, real or GREASE. If it is real, `server_name` is the outer name."""
    size: int
    """Bytes of the handshake message, including its four-byte header."""


class HelloReader:
    """Reads the ClientHello at the start of a connection, from bytes that arrive in any pieces.

    It holds at most `max_hello_bytes` plus MAX_RECORD_HEADERS bytes, one record, and the piece fed last.
    """

    __slots__ = ("_at", "_hello", "_max_hello_bytes", "_message", "_raw", "_record_left", "_refused", "_size")

    def __init__(self, max_hello_bytes: int = DEFAULT_MAX_HELLO_BYTES) -> None:
        """Start reading. `max_hello_bytes` bounds the length field of the handshake message."""
        self._max_hello_bytes = max_hello_bytes
        self._raw = bytearray()
        self._at = 0  # offset in `_raw` of the next byte to read
        self._record_left = 0  # bytes of the current record that have not been read
        self._message = bytearray()  # the reassembled handshake message
        self._size = 0  # of the handshake message with its header; 0 while unknown
        self._hello: Hello | None = None
        self._refused: tuple[HelloReason, str, bool] | None = None  # not the exception: its traceback holds this reader

    @property
    def raw(self) -> bytes:
        """Return everything fed so far, byte for byte."""
        return bytes(self._raw)

    @property
    def missing(self) -> int:
        """Return the least number of further bytes that is worth feeding, from 1 to MAX_RECORD.

        The first byte is worth it (it shows other protocols), then complete headers, then complete records.
        """
        if not self._record_left:
            return _RECORD_HEADER - (len(self._raw) - self._at) if self._raw else 1
        if not self._size:
            return min(self._record_left, _MESSAGE_HEADER - len(self._message))
        return self._record_left

    def feed(self, data: bytes | bytearray | memoryview) -> Hello | None:
        """Read more bytes; return the hello once it is complete, None until then.

        Anything behind the record that completes it, such as early data, is kept in `raw` and not parsed.
        Raises HelloError, and again for every later call.
        """
        self._raw += data
        if self._refused is not None:
            reason, detail, is_probe = self._refused
            raise HelloError(reason, detail, is_probe=is_probe)
        if self._hello is None:
            try:
                self._read()
            except HelloError as error:
                self._refused = error.reason, error.detail, error.is_probe
                raise
        return self._hello

    def _read(self) -> None:
        raw, message = self._raw, self._message
        at, end = self._at, len(raw)
        left = self._record_left
        while at < end:
            if not left:
                left = _record_length(raw, at, end)
                if not left:
                    break
                at += _RECORD_HEADER
                if at - len(message) > MAX_RECORD_HEADERS:
                    raise _bad(f"more than {MAX_RECORD_HEADERS} bytes of record headers")
                continue
            piece = raw[at : at + left]
            message += piece
            at += len(piece)
            left -= len(piece)
            if not self._size:
                self._size = self._message_size()
            if self._size and len(message) >= self._size:
                if left or len(message) > self._size:
                    raise _bad("the record continues behind the ClientHello")  # section 5.1
                self._hello = parse_client_hello(bytes(message))
                break
        self._at, self._record_left = at, left

    def _message_size(self) -> int:
        """Return the size of the message with its header, 0 while the header is incomplete."""
        message = self._message
        if message[0] != _CLIENT_HELLO:
            raise _bad(f"handshake message of type {message[0]}, not a ClientHello")
        if len(message) < _MESSAGE_HEADER:
            return 0
        length = int.from_bytes(message[1:_MESSAGE_HEADER], "big")
        if length > self._max_hello_bytes:
            raise _bad(f"a ClientHello of {length} bytes, the limit is {self._max_hello_bytes}")
        return _MESSAGE_HEADER + length


def _record_length(raw: bytearray, at: int, end: int) -> int:
    """Return the length of the record whose header is at `at`, 0 while the header is incomplete."""
    content_type = raw[at]
    if content_type != _HANDSHAKE or (at + 1 < end and raw[at + 1] != 3):
        if at:
            raise _bad("another kind of record inside the ClientHello")
        raise HelloError(HelloReason.NOT_TLS, _other_protocol(bytes(raw[:LONGEST_START])))
    if at + _RECORD_HEADER > end:
        return 0
    length = raw[at + 3] << 8 | raw[at + 4]
    if not 0 < length <= MAX_RECORD:
        raise _bad(f"a handshake record of {length} bytes")
    return length


def _other_protocol(start: bytes) -> str:
    begins = f"the connection begins with {start[:8].hex(' ')}"
    known = recognise(start)
    return begins if known is None else f"{begins}, as {known}"


def parse_client_hello(message: bytes) -> Hello:
    """Parse a complete handshake message. Raises HelloError."""
    if message[:1] != bytes([_CLIENT_HELLO]) or int.from_bytes(message[1:4], "big") != len(message) - _MESSAGE_HEADER:
        raise _bad("not exactly one ClientHello")
    version = int.from_bytes(message[4:6], "big")
    if version >> 8 != 3:
        raise _bad(f"client version {version:#06x}")
    session_id, at = _vector(message, _MESSAGE_HEADER + 2 + _RANDOM, 1, "session id")
    if len(session_id) > _MAX_SESSION_ID:
        raise _bad(f"session id of {len(session_id)} bytes")
    ciphers, at = _vector(message, at, 2, "cipher suites")
    if not ciphers or len(ciphers) % 2:
        raise _bad(f"cipher suites of {len(ciphers)} bytes")
    compressions, at = _vector(message, at, 1, "compression methods")
    if 0 not in compressions:
        raise _bad("compression methods without null")  # section 4.1.2
    raw_name: bytes | None = None
    alpn: tuple[bytes, ...] = ()
    versions: tuple[int, ...] = (version,)
    extensions = _extensions(message, at)
    for kind, value in extensions.items():
        if kind == _SERVER_NAME:
            raw_name = _host_name(value)
        elif kind == _ALPN:
            alpn = tuple(_protocols(value))
        elif kind == _SUPPORTED_VERSIONS:
            versions = tuple(_versions(value))
    if raw_name is None:
        if max(versions, default=version) == _SSL_3_0:
            # Of HAProxy's `ssl-hello-chk`, which takes an alert for a sign of life. No client has used SSL 3.0 since RFC 7568.
            raise HelloError(HelloReason.NO_SNI, "a ClientHello of SSL 3.0, as in health checks", is_probe=True)
        raise HelloError(HelloReason.NO_SNI, "no server_name extension")
    return Hello(
        server_name=_check_name(raw_name),
        raw_name=raw_name,
        digest=hashlib.sha256(message).digest(),
        alpn=alpn,
        versions=versions,
        ech=_ECH in extensions,
        size=len(message),
    )


def _vector(data: bytes, at: int, prefix: int, what: str) -> tuple[bytes, int]:
    """Return the vector at `at`, whose length field has `prefix` bytes, and the offset after it (section 3.4)."""
    start = at + prefix
    end = start + int.from_bytes(data[at:start], "big")
    if start > len(data) or end > len(data):
        raise _bad(f"{what}: longer than what holds it")
    return data[start:end], end


def _whole(data: bytes, prefix: int, what: str) -> bytes:
    """Return the vector that fills all of `data`. It must not be empty."""
    vector, end = _vector(data, 0, prefix, what)
    if end != len(data):
        raise _bad(f"{what}: {len(data) - end} bytes too many")
    if not vector:
        raise _bad(f"{what}: empty")
    return vector


def _extensions(message: bytes, at: int) -> dict[int, bytes]:
    """Return all extensions, in order. The message may end before their length field (section 4.1.2)."""
    if at == len(message):
        return {}
    block, at = _vector(message, at, 2, "extensions")
    if at != len(message):
        raise _bad(f"{len(message) - at} bytes behind the extensions")
    extensions: dict[int, bytes] = {}
    at = 0
    while at < len(block):
        kind = int.from_bytes(block[at : at + 2], "big")
        value, at = _vector(block, at + 2, 2, "extension")
        if kind in extensions:
            raise _bad(f"extension {kind} twice")  # section 4.2
        extensions[kind] = value
    return extensions


def _host_name(value: bytes) -> bytes:
    """Return the one host name of a server_name extension (RFC 6066 section 3)."""
    names = _whole(value, 2, "server names")
    if names[0] != _HOST_NAME:
        raise _bad(f"server name of type {names[0]}")
    name, end = _vector(names, 1, 2, "host name")
    if end != len(names):
        raise _bad("more than one server name")
    return name


def _protocols(value: bytes) -> Iterator[bytes]:
    """Yield the protocol names of an ALPN extension."""
    names = _whole(value, 2, "protocols")
    at = 0
    while at < len(names):
        name, at = _vector(names, at, 1, "protocol")
        if not name:
            raise _bad("protocol: empty")
        yield name


def _versions(value: bytes) -> Iterator[int]:
    """Yield the versions of a supported_versions extension, without GREASE (RFC 8701)."""
    versions = _whole(value, 1, "supported versions")
    if len(versions) % 2:
        raise _bad("supported versions: an odd number of bytes")
    for at in range(0, len(versions), 2):
        high, low = versions[at : at + 2]
        if high != low or high & 0x0F != 0x0A:
            yield high << 8 | low


def _check_name(raw_name: bytes) -> str:
    """Return the name in the form used for routing. Raises HelloError if it is not a valid name."""
    try:
        name = normalise(raw_name)
    except BadName as error:
        raise HelloError(HelloReason.BAD_NAME, error.detail) from error
    if _ENDS_IN_NUMBER.fullmatch(name):
        raise HelloError(HelloReason.BAD_NAME, "an address instead of a name")  # RFC 6066 section 3
    return name


def _bad(detail: str) -> HelloError:
    return HelloError(HelloReason.BAD_HELLO, detail)
