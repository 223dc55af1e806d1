"""Questions as bytes, good and bad ones, made without the code under test."""

import struct

RD, CD, AD = 0x0100, 0x0010, 0x0020


def name(text: str) -> bytes:
    """A dotted name in wire form, letters as they are."""
    labels = [label.encode("latin-1") for label in text.split(".") if label]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def question(text: str | bytes, qtype: int = 1, qclass: int = 1) -> bytes:
    stream = text if isinstance(text, bytes) else name(text)
    return stream + struct.pack("!HH", qtype, qclass)


def header(ident: int = 0x1234, flags: int = RD, counts: tuple[int, int, int, int] = (1, 0, 0, 0)) -> bytes:
    return struct.pack("!HH4H", ident, flags, *counts)


def opt(
    size: int = 1232, *, do: bool = False, version: int = 0, options: bytes = b"", owner: bytes = b"\0", z: int = 0
) -> bytes:
    return owner + struct.pack("!HHBBHH", 41, size, 0, version, (0x8000 if do else 0) | z, len(options)) + options


def option(code: int, value: bytes = b"") -> bytes:
    return struct.pack("!HH", code, len(value)) + value


def query(
    text: str | bytes, qtype: int = 1, *, ident: int = 0x1234, flags: int = RD, edns: bytes = b"", qclass: int = 1
) -> bytes:
    """A whole query; `edns` is an OPT record or nothing."""
    return header(ident, flags, (1, 0, 0, int(bool(edns)))) + question(text, qtype, qclass) + edns
