"""A scripted TURN server, for behaviour that real servers rarely show."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from turnreg.stun.auth import long_term_key
from turnreg.stun.message import HEADER_BYTES, Attribute, Message, MessageClass, Method, frame_length

KEY = long_term_key("u", "lab", "p")
RELAYED = ("127.0.0.1", 49_152)

Answer = Callable[[Message], bytes]
"""What to send for a request; b"" is silence."""


def signed(answer: Message, key: bytes = KEY) -> bytes:
    return answer.pack(integrity_key=key)


def error(code: int, *, nonce: str | None = None) -> Answer:
    """Answer with an unsigned error, a challenge if there is a nonce."""

    def answer(request: Message) -> bytes:
        message = request.refused(code, "as told")
        if nonce is not None:
            message = message.with_text(Attribute.REALM, "lab").with_text(Attribute.NONCE, nonce)
        return message.pack()

    return answer


def allocated(request: Message) -> Message:
    return (
        request.success()
        .with_xor_address(Attribute.XOR_RELAYED_ADDRESS, RELAYED)
        .with_xor_address(Attribute.XOR_MAPPED_ADDRESS, ("192.0.2.1", 1234))
        .with_number(Attribute.LIFETIME, 600)
    )


def good(request: Message) -> bytes:
    """Answer every request with success."""
    if request.method in (Method.ALLOCATE, Method.REFRESH):
        return signed(allocated(request))
    return signed(request.success())


@dataclass
class Scripted:
    """A running scripted server. Each answer of a list is used once, except the last, which repeats."""

    script: Mapping[Method, list[Answer]]
    requests: list[Message] = field(default_factory=list)
    port: int = 0
    address: str = "127.0.0.1"
    stray: bytes = b""
    """Bytes that arrived on data connections between a ConnectionBind and its answer."""
    bind_delay_s: float = 0.0
    control: asyncio.StreamWriter | None = None

    def count(self, method: Method) -> int:
        return sum(request.method == method for request in self.requests)

    def announce(self, number: int, peer: tuple[str, int] = ("127.0.0.1", 40_000)) -> None:
        """Send a ConnectionAttempt."""
        self.indicate(
            Message(Method.CONNECTION_ATTEMPT, MessageClass.INDICATION, bytes(12))
            .with_number(Attribute.CONNECTION_ID, number)
            .with_xor_address(Attribute.XOR_PEER_ADDRESS, peer)
        )

    def indicate(self, message: Message) -> None:
        assert self.control is not None
        self.control.write(message.pack())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = await reader.readexactly(HEADER_BYTES)
                body = await reader.readexactly((frame_length(head) or HEADER_BYTES) - HEADER_BYTES)
                request = Message.parse(head + body)
                self.requests.append(request)
                if request.method == Method.CONNECTION_BIND:
                    if self.bind_delay_s:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(self.bind_delay_s):
                                self.stray += await reader.read(100)
                else:
                    self.control = writer
                writer.write(self._answer(request))
        writer.close()

    def _answer(self, request: Message) -> bytes:
        if request.method == Method.ALLOCATE and not request.has_integrity:
            return error(401, nonce="n0")(request)
        answers = self.script.get(Method(request.method), [good])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return answer(request)


@contextlib.asynccontextmanager
async def scripted(script: Mapping[Method, list[Answer]] | None = None) -> AsyncIterator[Scripted]:
    """Run a scripted server while the block runs."""
    told = Scripted(dict(script or {}))
    server = await asyncio.start_server(told.serve, told.address, 0)
    told.port = server.sockets[0].getsockname()[1]
    try:
        yield told
    finally:
        server.close()
        if told.control is not None:
            told.control.close()
        await server.wait_closed()
