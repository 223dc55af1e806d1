"""The protocol between load generator and service."""

from bench.exchange import ECHO, UPLOAD, client_hello, parse_start, request
from sniproxy.formats.client_hello import HelloReader


def test_the_relay_can_parse_the_hello() -> None:
    data = client_hello("orders.example")
    reader = HelloReader()
    hello = reader.feed(data)
    assert hello is not None
    assert hello.server_name == "orders.example"


def test_a_request_is_parsed_only_when_it_is_complete() -> None:
    hello = client_hello("orders.example")
    data = hello + request(UPLOAD, ms=250, count=7)
    for size in range(len(data)):
        assert parse_start(data[:size]) is None
    assert parse_start(data + b"more") == (UPLOAD, 250, 7, len(data))
    assert parse_start(hello + request(ECHO)) == (ECHO, 0, 0, len(data))
