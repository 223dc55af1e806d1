"""The ClientHello parser compared with real peers: hellos of real clients, and the same name as in a real server."""

import random
import socket
import ssl
import subprocess
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.formats.client_hello import Hello, HelloError, HelloReader, HelloReason, parse_client_hello
from tests.support.hellos import (
    BROKEN,
    PADDING,
    alpn,
    client_hello,
    ech,
    message,
    python_hello,
    records,
    records_cut,
    server_name,
    supported_versions,
)


def read(*pieces: bytes) -> Hello | None:
    """Feed the pieces, and check that `raw` has them unchanged."""
    reader = HelloReader()
    hello = [reader.feed(piece) for piece in pieces][-1]
    assert reader.raw == b"".join(pieces)
    return hello


# --- clients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "routes_as"),
    [
        ("orders.shop.example", "orders.shop.example"),
        ("_8443._10-0-0-5._NetB.svc.mesh.internal", "_8443._10-0-0-5._netb.svc.mesh.internal"),
        ("orders.shop.example.", "orders.shop.example"),
    ],
)
def test_python_ssl(name: str, routes_as: str) -> None:
    wire = python_hello(name, protocols=["h2"])
    for pieces in ([wire], [bytes([byte]) for byte in wire]):
        hello = read(*pieces)
        assert hello is not None
        assert hello.server_name == routes_as
        assert hello.raw_name == name.encode()
        assert hello.alpn == (b"h2",)
        assert 0x0304 in hello.versions
        assert hello.size == len(wire) - 5


@pytest.mark.parametrize("name", ["10.0.0.5", "::1", None])
def test_python_ssl_sends_no_name_for_an_address(name: str | None) -> None:
    with pytest.raises(HelloError) as refused:
        read(python_hello(name))
    assert refused.value.reason is HelloReason.NO_SNI


def test_python_ssl_hello_survives_being_cut_into_records() -> None:
    wire = python_hello("orders.shop.example")
    expected = read(wire)
    for size in (1, 7, 100):
        assert read(records(wire[5:], size)) == expected


@pytest.mark.interop
@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    ("options", "record_count"),
    [
        ([], 1),
        (["-max_send_frag", "512", "-alpn", ",".join(["http/1.1"] * 60)], None),
        (["-tls1_2"], 1),
        (["-no_tls1_3", "-no_tls1_2"], 1),
    ],
    ids=["plain", "records of 512", "TLS 1.2", "older"],
)
def test_openssl_client(options: list[str], record_count: int | None) -> None:
    """What `openssl s_client` sends over a real connection, to the end of its hello."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        port = server.getsockname()[1]
        command = [
            "openssl",
            "s_client",
            "-connect",
            f"127.0.0.1:{port}",
            "-servername",
            "Orders.Shop.example",
            *options,
        ]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as client:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(10)
                reader = HelloReader()
                hello = None
                while hello is None:
                    data = connection.recv(65536)
                    assert data, "the client closed before its hello was complete"
                    hello = reader.feed(data)
            client.wait(10)
    assert hello.server_name == "orders.shop.example"
    assert hello.raw_name == b"Orders.Shop.example"
    counted = len(reader.raw) - hello.size
    assert counted % 5 == 0
    if record_count is None:
        assert counted // 5 == -(-hello.size // 512) > 1
        assert hello.alpn == (b"http/1.1",) * 60
    else:
        assert counted // 5 == record_count
    assert bool(0x0304 in hello.versions) == (not any("tls1" in option for option in options))


# --- a server -------------------------------------------------------------------------------------------------------

names = st.from_regex(r"(?:[a-zA-Z0-9_-]{1,12}\.){1,5}[a-zA-Z]{2,8}\.?", fullmatch=True).map(str.encode)
others = st.tuples(st.integers(100, 0xFFFF).filter(lambda kind: kind != 0xFE0D), st.binary(max_size=60))
cuts = st.lists(st.integers(0, 5000), max_size=12)


class Server:
    """OpenSSL as a server without a certificate: it only reads the name, or refuses."""

    def __init__(self) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.set_ciphers("ALL:@SECLEVEL=0")
        self._context.sni_callback = self._note
        self._name: str | None = None

    def _note(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        self._name = name

    def read(self, wire: bytes) -> bytes | None:
        """Return the name that the server sees in a connection with this start."""
        self._name = None
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = self._context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(wire)
        with suppress(ssl.SSLError):
            server.do_handshake()
        return None if self._name is None else self._name.encode()


SERVER = Server()


def test_a_real_server_is_hardly_more_tolerant() -> None:
    """Strictness costs nothing: of the broken hellos OpenSSL accepts two, which no client sends (RFC 8701, 4.2)."""
    tolerated = {what for what, whole in BROKEN.items() if SERVER.read(records(whole)) is not None}
    assert tolerated <= {"GREASE twice", "client version 4"}


@given(names, cuts)
def test_a_real_server_sees_the_same_name(name: bytes, in_records: list[int]) -> None:
    whole = python_hello(name.decode())[5:]
    wire = records_cut(whole, [at % len(whole) for at in in_records])
    assert SERVER.read(wire) == parse_client_hello(whole).raw_name == name


odd_names = st.text(st.characters(max_codepoint=127), max_size=6).map(str.encode)
skews = st.sampled_from([0] * 20 + [-1, 1, 3])


def skewed(data: bytes, prefix: int, skew: int) -> bytes:
    """Prefix `data` with a length that may be slightly wrong."""
    return max(len(data) + skew, 0).to_bytes(prefix, "big") + data


@st.composite
def doubtful_messages(draw: st.DrawFn) -> bytes:
    """TLS 1.2 hellos that a server would answer, except that names and lengths may be wrong anywhere."""

    def doubtful_names() -> bytes:
        listed = b"".join(
            bytes([draw(st.sampled_from([0, 0, 0, 1]))]) + skewed(draw(names | odd_names), 2, draw(skews))
            for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2])))
        )
        return skewed(listed, 2, draw(skews)) + draw(st.sampled_from([b""] * 9 + [b"\0", b"a.example"]))

    extensions = [(0, doubtful_names()) for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2])))]
    extensions += draw(st.lists(others, max_size=2))
    joined = b"".join(
        kind.to_bytes(2, "big") + skewed(value, 2, draw(skews)) for kind, value in draw(st.permutations(extensions))
    )
    return message(
        block=skewed(joined, 2, draw(skews)),
        behind=draw(st.sampled_from([b""] * 9 + [b"\0", PADDING.to_bytes(2, "big") + b"\0\0"])),
        session_id=draw(st.sampled_from([b"", bytes(32)])),
    )


@given(doubtful_messages())
def test_a_real_server_never_sees_another_name(whole: bytes) -> None:
    """The reason for all strictness: the name that we route by is the name that the server sees."""
    wire = records(whole)
    with suppress(HelloError):
        hello = read(wire)
        assert hello is not None
        assert SERVER.read(wire) in (hello.raw_name, None)


SEEDS = [
    python_hello("orders.shop.example", protocols=["h2"]),
    python_hello("a.b"),
    client_hello("orders.shop.example"),
    records(message(server_name(b"orders.shop.example"), ech(), alpn(b"h2"), supported_versions(0x0304)), 100),
    records(message(server_name(b"orders.shop.example")), 7),
]


def mutated(wire: bytes, source: random.Random) -> bytes:
    """Change some bytes: to extremes, by one, removed, inserted, doubled."""
    result = bytearray(wire)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(result))
        match source.randrange(6):
            case 0:
                result[at] = source.choice((0, 1, 0x16, 0x7F, 0x80, 0xFF))
            case 1:
                result[at] = source.randrange(256)
            case 2:
                result[at] = (result[at] + source.choice((-1, 1))) % 256
            case 3:
                del result[at : at + source.randint(1, 4)]
            case 4:
                result[at:at] = source.randbytes(source.randint(1, 4))
            case 5:
                start = source.randrange(len(result))
                result[at:at] = result[start : start + source.randint(1, 40)]
        if not result:
            break
    return bytes(result)


def test_200_000_mutated_hellos() -> None:
    """They raise only HelloError. Of those that pass, one in ten is also given to a real server."""
    source = random.Random(2026)
    passed = 0
    for _ in range(200_000):
        wire = mutated(source.choice(SEEDS), source)
        try:
            hello = HelloReader().feed(wire)
        except HelloError:
            continue
        if hello is not None:
            passed += 1
            if passed % 10 == 0:
                assert SERVER.read(wire) in (hello.raw_name, None), wire.hex()
    assert passed > 20_000
