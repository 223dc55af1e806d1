"""What clients of other protocols begin with, each with what to use instead: bytes from specifications, and real clients."""

import socket
import subprocess
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy.formats.client_hello import HelloError, HelloReader, HelloReason
from sniproxy.formats.other_protocols import LONGEST_START, recognise, silent

STARTS: list[tuple[bytes, str]] = [
    (bytes.fromhex("00000008 04d2162f"), "sslnegotiation=direct"),
    (bytes.fromhex("00000008 04d21630"), "sslnegotiation=direct"),
    (bytes.fromhex("00000029 00030000") + b"user\0", "sslmode=require sslnegotiation=direct"),
    (b"GET / HTTP/1.1\r\n", "https"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "https"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
    (b"EHLO mail.example\r\n", "smtps"),
    (b"a001 STARTTLS\r\n", "imaps"),
    (b"A1 CAPABILITY\r\n", "imaps"),
    (b"STLS\r\n", "pop3s"),
    (b"AUTH TLS\r\n", "ftps"),
    (b"<?xml version='1.0'?><stream:stream", "xmpps"),
    (bytes.fromhex("301d02010177188016") + b"1.3.6.1.4.1.1466.20037", "ldaps"),
    (bytes.fromhex("1201002f00000100"), "Encrypt=Strict"),
    (bytes.fromhex("030000130ee000000000000100080003000000"), "RDP"),
    (bytes.fromhex("3a000000 01000000 00000000 dd070000 00000000"), "tls=true"),
    (b"*1\r\n$4\r\nPING\r\n", "rediss"),
    (b"AMQP\x00\x00\x09\x01", "amqps"),
    (bytes.fromhex("101000044d515454") + b"\x04\x02", "mqtts"),
    (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "relay.proxy_from"),
    (bytes.fromhex("0d0a0d0a000d0a515549540a2111"), "relay.proxy_from"),
    (bytes.fromhex("050100"), "SOCKS"),
    (bytes.fromhex("16fefd0000"), "DTLS"),
    (bytes.fromhex("1703030005"), "another connection"),
    (bytes.fromhex("802e010301"), "SSL 2.0"),
]


@pytest.mark.parametrize(("start", "remedy"), STARTS)
def test_the_protocol_and_what_to_use_instead(start: bytes, remedy: str) -> None:
    with pytest.raises(HelloError) as refused:
        HelloReader().feed(start)
    assert refused.value.reason is HelloReason.NOT_TLS
    assert start[:8].hex(" ") in refused.value.detail
    assert remedy in refused.value.detail
    assert len(refused.value.detail) <= 200, "a longer text is cut in the log"
    assert recognise(start[:LONGEST_START]) == recognise(start)


@pytest.mark.parametrize("start", [b"", b"\0", b"\x80", b"G", b"hello", b"\0" * 16, b"\xff" * 16])
def test_what_is_not_known(start: bytes) -> None:
    assert recognise(start) is None


@given(st.binary(max_size=40))
def test_any_start_gets_one_meaning_or_none(start: bytes) -> None:
    meaning = recognise(start)
    assert meaning is None or meaning.isascii()


@pytest.mark.parametrize(("port", "protocol"), [(3306, "MySQL"), (587, "smtps"), (143, "imaps"), (443, "MySQL, SMTP")])
def test_a_client_that_waits_for_the_server(port: int, protocol: str) -> None:
    assert protocol in silent(port)


def first_bytes(*command: str) -> bytes:
    """Return what a real client sends first. `PORT` in the command stands for where it connects to."""
    got: list[bytes] = []

    def take() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            got.append(connection.recv(1000))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=take)
        thread.start()
        port = str(listener.getsockname()[1])
        subprocess.run(
            [part.replace("PORT", port) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
        thread.join(20)
    return got[0]


@pytest.mark.interop
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        pytest.param(
            ("psql", "host=127.0.0.1 port=PORT user=a dbname=a sslmode=require"),
            "sslnegotiation=direct",
            marks=pytest.mark.needs("psql"),
            id="psql with TLS",
        ),
        pytest.param(
            ("psql", "host=127.0.0.1 port=PORT user=a dbname=a sslmode=disable gssencmode=disable"),
            "sslmode=require",
            marks=pytest.mark.needs("psql"),
            id="psql without TLS",
        ),
        pytest.param(
            ("curl", "-s", "--noproxy", "*", "http://127.0.0.1:PORT/"),
            "https",
            marks=pytest.mark.needs("curl"),
            id="curl",
        ),
        pytest.param(
            ("ssh", "-o", "BatchMode=yes", "-F", "none", "-p", "PORT", "a@127.0.0.1"),
            "SSH",
            marks=pytest.mark.needs("ssh"),
            id="ssh",
        ),
        pytest.param(
            ("curl", "-s", "--noproxy", "*", "--max-time", "5", "mqtt://127.0.0.1:PORT/topic"),
            "mqtts",
            marks=pytest.mark.needs("curl"),
            id="mqtt",
        ),
        pytest.param(
            ("curl", "-s", "--max-time", "5", "--proxy", "socks5://127.0.0.1:PORT", "https://a.example/"),
            "SOCKS",
            marks=pytest.mark.needs("curl"),
            id="socks",
        ),
    ],
)
def test_real_clients(command: tuple[str, ...], remedy: str) -> None:
    assert remedy in str(recognise(first_bytes(*command)))
