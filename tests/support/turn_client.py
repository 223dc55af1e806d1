"""A TURN client with blocking sockets, which sends exactly what a test wants, valid or not."""

import os
import secrets
import socket
import struct
from typing import Self

from tests.support.waiting import wait_until
from turnreg.stun.auth import long_term_key
from turnreg.stun.message import (
    MAX_INDICATION_BYTES,
    TRANSPORT_TCP,
    Attribute,
    Message,
    MessageClass,
    Method,
    frame_length,
)

TIMEOUT_S = 10.0


class Client:
    """One TCP connection to a TURN server, with credentials and the current nonce."""

    def __init__(
        self,
        server: tuple[str, int],
        *,
        user: str = "u",
        password: str = "p",
        realm: str = "lab",
        nonce: str = "",
        receive_buffer: int | None = None,
    ) -> None:
        self.server = server
        self.sock = socket.socket(socket.AF_INET6 if ":" in server[0] else socket.AF_INET)
        if receive_buffer is not None:  # before connecting: a window that was offered may not shrink
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(server)
        self.user, self.password, self.realm, self.nonce = user, password, realm, nonce
        self.relayed = ("", 0)
        self._buffer = b""
        self._set_aside: list[Message] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def key(self) -> bytes:
        return long_term_key(self.user, self.realm, self.password)

    def bare(self, method: Method) -> Message:
        return Message(method, MessageClass.REQUEST, secrets.token_bytes(12))

    def credentials(self, message: Message) -> Message:
        return (
            message.with_text(Attribute.USERNAME, self.user)
            .with_text(Attribute.REALM, self.realm)
            .with_text(Attribute.NONCE, self.nonce)
        )

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> Message:
        """The next message; EOFError at the end of the stream, ConnectionResetError, TimeoutError."""
        while True:
            length = frame_length(self._buffer[:8], MAX_INDICATION_BYTES)
            if length is not None and len(self._buffer) >= length:
                message = Message.parse(self._buffer[:length], MAX_INDICATION_BYTES)
                self._buffer = self._buffer[length:]
                return message
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self._buffer += data

    def rest(self) -> bytes:
        """The bytes after the last message."""
        rest, self._buffer = self._buffer, b""
        return rest

    def answer_to(self, request: Message) -> Message:
        while True:
            message = self.receive()
            if message.transaction_id == request.transaction_id:
                return message
            self._set_aside.append(message)

    def ask(self, request: Message, *, sign: bool = True, fingerprint: bool = False) -> Message:
        """Send one request, signed with our credentials, and return its answer. Stores a new nonce, but does not retry."""
        data = (
            self.credentials(request).pack(integrity_key=self.key, fingerprint=fingerprint) if sign else request.pack()
        )
        self.send(data)
        answer = self.answer_to(request)
        self.nonce = answer.text(Attribute.NONCE) or self.nonce
        return answer

    def login(self) -> None:
        """Get a nonce, by the 401 that a bare Allocate is answered with."""
        answer = self.ask(self.allocate_request(), sign=False)
        assert answer.error == (401, "Unauthorized"), answer

    def allocate_request(self, transport: int = TRANSPORT_TCP) -> Message:
        return self.bare(Method.ALLOCATE).with_first_byte(Attribute.REQUESTED_TRANSPORT, transport)

    def allocate(self, request: Message | None = None) -> tuple[str, int]:
        """Log in and allocate; returns the relayed address."""
        self.login()
        answer = self.ask(request or self.allocate_request())
        assert answer.message_class is MessageClass.SUCCESS, answer.error
        relayed = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
        assert relayed is not None
        self.relayed = relayed
        return relayed

    def refresh(self, lifetime_s: int) -> Message:
        return self.ask(self.bare(Method.REFRESH).with_number(Attribute.LIFETIME, lifetime_s))

    def permit(self, *addresses: str) -> Message:
        request = self.bare(Method.CREATE_PERMISSION)
        for address in addresses:
            request = request.with_xor_address(Attribute.XOR_PEER_ADDRESS, (address, 0))
        return self.ask(request)

    def attempt(self) -> Message:
        """The next ConnectionAttempt."""
        if self._set_aside:
            return self._set_aside.pop(0)
        message = self.receive()
        assert message.method == Method.CONNECTION_ATTEMPT, message
        return message

    def open_data(self) -> "Client":
        """A new connection with the same credentials and nonce."""
        return Client(self.server, user=self.user, password=self.password, realm=self.realm, nonce=self.nonce)

    def bind_request(self, connection_id: bytes) -> Message:
        return self.bare(Method.CONNECTION_BIND).with_bytes(Attribute.CONNECTION_ID, connection_id)

    def bind(self, attempt: Message) -> "Client":
        """Bind a new data connection to the peer of that attempt."""
        data = self.open_data()
        answer = data.ask(data.bind_request(attempt.get(Attribute.CONNECTION_ID) or b""))
        assert answer.message_class is MessageClass.SUCCESS, answer.error
        return data

    # -- datagrams

    def channel_bind(self, channel: int, peer: tuple[str, int]) -> Message:
        request = self.bare(Method.CHANNEL_BIND).with_number(Attribute.CHANNEL_NUMBER, channel << 16)
        return self.ask(request.with_xor_address(Attribute.XOR_PEER_ADDRESS, peer))

    def send_indication(self, peer: tuple[str, int], data: bytes, *, dont_fragment: bool = False) -> None:
        message = Message(Method.SEND, MessageClass.INDICATION, secrets.token_bytes(12))
        message = message.with_xor_address(Attribute.XOR_PEER_ADDRESS, peer).with_bytes(Attribute.DATA, data)
        if dont_fragment:
            message = message.with_bytes(Attribute.DONT_FRAGMENT, b"")
        self.send(message.pack())

    def data_indication(self) -> tuple[tuple[str, int] | None, bytes | None]:
        """Peer and data of the next Data indication."""
        message = self._set_aside.pop(0) if self._set_aside else self.receive()
        assert (message.method, message.message_class) == (Method.DATA, MessageClass.INDICATION)
        return message.xor_address(Attribute.XOR_PEER_ADDRESS), message.get(Attribute.DATA)

    def channel_data(self) -> tuple[int, bytes]:
        """Channel and data of the next ChannelData over a stream, its padding (anything: coturn does not clear it) taken off."""
        while len(self._buffer) < 4 or len(self._buffer) < 4 + (length := self._length()) + -length % 4:
            self._buffer += self.sock.recv(65536)
        length = self._length()
        channel, data = int.from_bytes(self._buffer[:2], "big"), self._buffer[4 : 4 + length]
        self._buffer = self._buffer[4 + length + -length % 4 :]
        return channel, data

    def _length(self) -> int:
        return int.from_bytes(self._buffer[2:4], "big")


class DatagramClient(Client):
    """The same over UDP."""

    def __init__(self, server: tuple[str, int], *, user: str = "u", password: str = "p", realm: str = "lab") -> None:
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        self.server = server
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(server)
        self.user, self.password, self.realm, self.nonce = user, password, realm, ""
        self.relayed = ("", 0)
        self._buffer = b""
        self._set_aside: list[Message] = []

    def send(self, data: bytes) -> None:
        self.sock.send(data)

    def receive(self) -> Message:
        return Message.parse(self.sock.recv(65536), MAX_INDICATION_BYTES)

    def channel_data(self) -> tuple[int, bytes]:
        packet = self.sock.recv(65536)
        assert int.from_bytes(packet[2:4], "big") == len(packet) - 4  # no padding over UDP
        return int.from_bytes(packet[:2], "big"), packet[4:]


def code(answer: Message) -> int:
    """0 for a success, else the error code."""
    return 0 if answer.error is None else answer.error[0]


def unknown_attributes(answer: Message) -> tuple[int, ...]:
    """The types that a 420 lists."""
    value = answer.get(Attribute.UNKNOWN_ATTRIBUTES) or b""
    return struct.unpack(f"!{len(value) // 2}H", value)


def connect(address: tuple[str, int], source: str = "127.0.0.1") -> socket.socket:
    """A peer."""
    return socket.create_connection(address, timeout=TIMEOUT_S, source_address=(source, 0))


def read_all(sock: socket.socket, already: bytes = b"") -> tuple[bytes, str]:
    """Read until the end; return the bytes, and how it ended: "fin", "reset" or "silence"."""
    data = bytearray(already)
    while True:
        try:
            more = sock.recv(1 << 20)
        except ConnectionResetError:
            return bytes(data), "reset"
        except TimeoutError:
            return bytes(data), "silence"
        if not more:
            return bytes(data), "fin"
        data += more


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def noise(size: int) -> bytes:
    return os.urandom(size)


def until_refused(address: tuple[str, int]) -> bool:
    """Wait until the port is closed; never False."""

    def is_refused() -> bool:
        try:
            connect(address).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass
        return False

    return wait_until(is_refused)
