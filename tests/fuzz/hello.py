"""Fuzz the relay's parsers of untrusted input: PROXY headers and ClientHellos.

    python tests/fuzz/hello.py -max_total_time=60       needs atheris (pip install '.[fuzz]'); starts from tests/fuzz/hello/

For any input, the only errors are HelloError and ProxyError; the same bytes give the same result, however they are split; all bytes
that were read are kept; and a name in the result is safe to log and to route by.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sniproxy"]):
    from sniproxy.formats.client_hello import Hello, HelloError, HelloReader
    from sniproxy.formats.proxy_protocol import ProxyError, parse_any

CORPUS = Path(__file__).parent / "hello"
NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


def read(pieces: list[bytes]) -> tuple[Hello | str | None, bytes]:
    """Feed these pieces to a parser. Returns the hello, the reason of its error, or None if incomplete; and the bytes it kept."""
    reader = HelloReader()
    try:
        for index, piece in enumerate(pieces):
            hello = reader.feed(piece)
            if hello is not None:
                return hello, reader.raw + b"".join(pieces[index + 1 :])
    except HelloError as error:
        return error.reason, b""
    return None, reader.raw


def test_one_input(data: bytes) -> None:
    if not data:
        return
    cut, rest = data[0] * len(data) // 256, data[1:]
    try:
        header = parse_any(rest) if rest else None
    except ProxyError:
        header = None
    if header is not None:
        assert 0 < header[1] <= len(rest)
        rest = rest[header[1] :]
    if not rest:
        return
    whole, kept = read([rest])
    pieces, kept_pieces = read([piece for piece in (rest[:cut], rest[cut:]) if piece])
    assert whole == pieces, (whole, pieces)
    if isinstance(whole, Hello):
        assert kept == kept_pieces == rest
        assert whole.server_name
        assert len(whole.server_name) <= 253
        assert set(whole.server_name) <= NAME, whole.server_name
    elif whole is None:
        assert kept == kept_pieces == rest


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as found:
        given = [] if any(not argument.startswith("-") for argument in sys.argv[1:]) else [found, str(CORPUS)]
        atheris.Setup([*sys.argv, *given], test_one_input)
        atheris.Fuzz()
