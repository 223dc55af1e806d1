"""A small authoritative server on loopback: the upstream of the tests. It answers over UDP and TCP on one port.

It remembers every question with its transport, source and bytes, and can be told to misbehave: `script` gets each question
and returns the packets to send, in place of the one good answer.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

Script = Callable[["Asked"], list[bytes]]

ZONE_TTL = 300


@dataclass(frozen=True)
class Asked:
    """One received question."""

    packet: bytes
    source: tuple[str, int]
    tcp: bool
    answer: bytes
    """The regular answer."""

    @property
    def message(self) -> dns.message.Message:
        return dns.message.from_wire(self.packet)

    @property
    def question(self) -> bytes:
        """The question section alone."""
        return self.packet[12 : self.packet.index(0, 12) + 5]

    @property
    def name(self) -> str:
        return self.message.question[0].name.to_text(omit_final_dot=True).lower()

    @property
    def rdtype(self) -> str:
        return dns.rdatatype.to_text(self.message.question[0].rdtype)


@dataclass
class Authority:
    """The server. `records` maps (name, type) to lists of record data; other names do not exist."""

    records: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    script: Script | None = None
    asked: list[Asked] = field(default_factory=list)
    address: str = "127.0.0.1"
    port: int = 0
    connections: int = 0
    close_after: int | None = None
    """Number of answers after which a TCP connection is closed."""

    most_open: int | None = None
    """Number of TCP connections at a time; more are closed at once."""

    writers: set[asyncio.StreamWriter] = field(default_factory=set)
    """The open TCP connections."""

    news: asyncio.Event = field(default_factory=asyncio.Event)
    transport: asyncio.DatagramTransport | None = None

    def send(self, packet: bytes, destination: tuple[str, int]) -> None:
        """Send an unsolicited packet."""
        assert self.transport is not None
        self.transport.sendto(packet, destination)

    def hang_up(self) -> None:
        """Close all TCP connections."""
        for writer in self.writers:
            writer.close()

    def packets(self, packet: bytes, source: tuple[str, int], *, tcp: bool) -> list[bytes]:
        answer = self._answer(packet, tcp=tcp)
        asked = Asked(packet, source, tcp, answer)
        self.asked.append(asked)
        self.news.set()
        return [answer] if self.script is None else self.script(asked)

    def types_asked(self, name: str) -> list[str]:
        return [asked.rdtype for asked in self.asked if asked.name == name.lower()]

    async def heard(self, count: int) -> None:
        """Wait until `count` questions have arrived in total."""
        async with asyncio.timeout(5):
            while len(self.asked) < count:
                self.news.clear()
                await self.news.wait()

    def _answer(self, packet: bytes, *, tcp: bool) -> bytes:
        query = dns.message.from_wire(packet)
        reply = dns.message.make_response(query, our_payload=1232)
        reply.flags |= dns.flags.AA | dns.flags.RA
        asked = query.question[0]
        name = asked.name.to_text(omit_final_dot=True).lower()
        for _ in range(8):
            alias = self.records.get((name, "CNAME"))
            if alias is None:
                break
            reply.answer.append(dns.rrset.from_text(dns.name.from_text(name), ZONE_TTL, "IN", "CNAME", alias[0] + "."))
            name = alias[0]
        data = self.records.get((name, dns.rdatatype.to_text(asked.rdtype)))
        if data:
            reply.answer.append(dns.rrset.from_text(dns.name.from_text(name), ZONE_TTL, "IN", asked.rdtype, *data))
        else:
            if not any(known == name or known.endswith("." + name) for known, _ in self.records):
                reply.set_rcode(dns.rcode.NXDOMAIN)
            soa = "ns.test. admin.test. 1 2 3 4 60"
            zone = name.rpartition(".")[2] + "."
            reply.authority.append(dns.rrset.from_text(zone, 60, "IN", "SOA", soa))
        limit = 65535 if tcp else max(512, query.payload) if query.edns >= 0 else 512
        stream = reply.to_wire(max_size=65535)
        return stream if len(stream) <= limit else self._truncated(reply)

    @staticmethod
    def _truncated(reply: dns.message.Message) -> bytes:
        reply.flags |= dns.flags.TC
        reply.answer.clear()
        reply.authority.clear()
        return reply.to_wire()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport) or hasattr(transport, "sendto")
        self.transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self.transport is not None
        for packet in self.authority.packets(data, addr[:2], tcp=False):
            self.transport.sendto(packet, addr)


@contextlib.asynccontextmanager
async def serving(
    records: dict[tuple[str, str], list[str]] | None = None, address: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Authority]:
    authority = Authority(records=records or {}, address=address)
    loop = asyncio.get_running_loop()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        authority.connections += 1
        if authority.most_open is not None and len(authority.writers) >= authority.most_open:
            writer.close()
            return
        authority.writers.add(writer)
        answered = 0
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while authority.close_after is None or answered < authority.close_after:
                size = int.from_bytes(await reader.readexactly(2), "big")
                packet = await reader.readexactly(size)
                for answer in authority.packets(packet, writer.get_extra_info("peername")[:2], tcp=True):
                    writer.write(len(answer).to_bytes(2, "big") + answer)
                answered += 1
                await writer.drain()
        authority.writers.discard(writer)
        writer.close()

    listening, datagrams = _both(address, port)
    authority.port = listening.getsockname()[1]
    transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(authority), sock=datagrams)
    authority.transport = transport
    server = await asyncio.start_server(connection, sock=listening)
    try:
        yield authority
    finally:
        transport.close()
        server.close()


def _both(address: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Bind TCP and UDP to one port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(16):
        stream = socket.create_server((address, port), family=family)
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        try:
            datagrams.bind((address, stream.getsockname()[1]))
        except OSError:
            stream.close()
            datagrams.close()
            continue
        datagrams.setblocking(False)
        return stream, datagrams
    raise OSError("no port is free for both")
