"""Clients that ask the resolver faster than it answers: all others are answered, and SIGTERM ends it."""

import socket
from pathlib import Path

import pytest

from bench.fair_dns import CLIENTS, HOST, Resolver, flooding, took_ms
from bench.fairness import DRAIN_S, LIMIT_S

QUESTIONS_S = 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "connections"), [("own", 8), ("own", 64), ("garbage", 8), ("missed", 8), ("unread", 8), ("udp", 1)]
)
def test_a_flood_does_not_block_other_clients(tmp_path: Path, what: str, connections: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind((HOST, 0))  # an upstream that never answers
        resolver = Resolver(tmp_path, nobody.getsockname()[1])
        try:
            with flooding(resolver.address, what, connections, 60):
                for client in CLIENTS:
                    took = took_ms(client, resolver.address, QUESTIONS_S)
                    assert took[-1] < LIMIT_S * 1000
                ended_s = resolver.terminate()
            assert ended_s is not None
            assert ended_s < DRAIN_S + 1
        finally:
            resolver.end()
