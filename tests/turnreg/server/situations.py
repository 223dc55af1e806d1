"""Initial states for the cases of the behaviour table."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.turn_client import Client, code, connect

Server = tuple[str, int]


@contextmanager
def control(server: Server) -> Iterator[Client]:
    """A client with an allocation and a permission for 127.0.0.1."""
    with Client(server) as client:
        client.allocate()
        assert code(client.permit("127.0.0.1")) == 0
        yield client


@contextmanager
def stream(server: Server) -> Iterator[tuple[socket.socket, socket.socket, Client]]:
    """A peer, the data connection bound to it, and the control connection."""
    with control(server) as client, connect(client.relayed) as peer, client.bind(client.attempt()) as data:
        assert data.rest() == b""
        yield peer, data.sock, client


def sees_reset(peer: socket.socket) -> bool:
    """Tell whether a connected peer is reset. False for a FIN or silence."""
    try:
        return peer.recv(1) == b"?"
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
