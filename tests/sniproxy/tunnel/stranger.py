"""A gateway written from sniproxy/tunnel/PROTOCOL.md alone, with the standard library alone: it shares no line with ours.

gateway = StrangerGateway(network="b", addressee="gw-1", keys={"ab-1": ("a", "b", secret)})
async with await asyncio.start_server(gateway.serve, "127.0.0.1", 0): ...
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import os
import re
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
DATA, FINAL_DATA = 0x2028D7F0, 0x2028D7F1
READY, OPENED, REFUSED, FINISHED = 0x20637200, 0x20637201, 0x20637202, 0x20637203
PING, PONG, OPEN, DONE, RECEIVED, CONTINUED = 0x20637204, 0x20637205, 0x20637206, 0x20637207, 0x20637208, 0x20637209

WORDS = {0x02, 0xE0, 0xE1, 0xE7, 0xE8}
SIZES = {0x05: 16, 0xE2: 8, 0xE3: 32, 0xE5: 1, 0xE9: 32, 0xEA: 1, 0xEB: 1, 0xEC: 16}
WARM = {0x05, 0xE0, 0xE1, 0xE2, 0xE3, 0xE5, 0xE7, 0xE8}
STREAM = WARM | {0x02, 0xE4, 0xEA}
KNOWN = STREAM | {0xE9, 0xEB, 0xEC}


class RefusedError(Exception):
    """What the relay is told."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def epoch_text(epoch: bytes) -> str:
    """Section 4: how records and refusals spell an epoch."""
    return base64.b32encode(epoch).decode().lower().rstrip("=")


def capsule(kind: int, value: bytes = b"") -> bytes:
    """Section 5: both varints in four bytes."""
    return struct.pack(">II", 1 << 31 | kind, 1 << 31 | len(value)) + value


def tlvs_of(header: bytes) -> tuple[bool, dict[int, bytes]]:
    """Section 2: whether it is a warm preamble, and its TLVs. Raises RefusedError."""
    try:
        (length,) = struct.unpack_from(">H", header, 14)
        at = 16 + {0x00: 0, 0x11: 12, 0x21: 36}[header[13]]
        found: list[tuple[int, bytes]] = []
        assert header[12] in (0x20, 0x21)
        assert len(header) == 16 + length <= 1024
        while at < len(header):
            kind, size = struct.unpack_from(">BH", header, at)
            assert at + 3 + size <= len(header)
            found.append((kind, header[at + 3 : at + 3 + size]))
            at += 3 + size
        assert found
        assert found[-1][0] == 0xE3
        values = dict(found)
        warm = header[12] == 0x20
        ours = [kind for kind, _ in found if kind in KNOWN or (kind == 0xED and not warm)]
        assert len(ours) == len(set(ours))
        assert (WARM if warm else STREAM) <= values.keys()
        assert not warm or not values.keys() & (KNOWN - WARM - {0xEC})
        assert warm or header[13]
        assert all(len(values[kind]) == size for kind, size in SIZES.items() if kind in values)
        assert all(re.fullmatch(rb"[!-~]{1,255}", values[kind]) for kind in WORDS if kind in values)
        assert values[0xE5] == values.get(0xEB, b"\1") == b"\1"
        assert warm or re.fullmatch(rb"[a-z0-9*. -]{0,300}", values.get(0xED, b""))
        assert warm or spelled_right(values[0xE4].decode("ascii"))
    except (AssertionError, KeyError, IndexError, struct.error, ValueError) as error:
        raise RefusedError("protocol_error", "the preamble") from error
    return warm, values


def spelled_right(target: str) -> bool:
    """Section 2: the one spelling of a target."""
    host, _, port = target.rpartition(":")
    if not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) > 65535:
        return False
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
        return bool(re.fullmatch(rf"({label}\.)+{label}", host)) and not host.rpartition(".")[2].isdigit()
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped is None and host == f"[{address}]"
    return host == str(address)


def client_hello(payload: bytes) -> tuple[bytes, str, int] | None:
    """Return digest, name and end of a ClientHello; None while it is incomplete. RFC 8446 section 4."""
    message, at = b"", 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        if len(payload) < at + 5 or len(payload) < at + 5 + int.from_bytes(payload[at + 3 : at + 5], "big"):
            return None
        if payload[at] != 22:
            raise RefusedError("not_tls")
        size = int.from_bytes(payload[at + 3 : at + 5], "big")
        message += payload[at + 5 : at + 5 + size]
        at += 5 + size
    place = 4 + 2 + 32
    place += 1 + message[place]
    place += 2 + int.from_bytes(message[place : place + 2], "big")
    place += 1 + message[place] + 2
    while place < len(message):
        kind, size = struct.unpack_from(">HH", message, place)
        if kind == 0:
            return hashlib.sha256(message).digest(), message[place + 9 : place + 4 + size].decode().lower(), at
        place += 4 + size
    raise RefusedError("no_sni")


@dataclass
class Connection:
    """One connection of a relay."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: int = 0

    async def exactly(self, size: int) -> bytes:
        self.received += size
        return await self.reader.readexactly(size)

    async def varint(self) -> int:
        first = await self.exactly(1)
        rest = await self.exactly((1 << (first[0] >> 6)) - 1)
        return int.from_bytes(bytes([first[0] & 0x3F]) + rest, "big")

    async def capsules(self) -> AsyncIterator[tuple[int, bytes]]:
        while True:
            kind, size = await self.varint(), await self.varint()
            yield kind, await self.exactly(size)

    async def say(self, *capsules: bytes) -> None:
        self.writer.write(b"".join(capsules))
        await self.writer.drain()


@dataclass
class StrangerGateway:
    """A gateway of one network."""

    network: str
    addressee: str
    keys: dict[str, tuple[str, str, bytes]]
    epoch: bytes = field(default_factory=lambda: os.urandom(16))
    through_turn: bool = False
    require_epoch: bool = False
    seen: set[bytes] = field(default_factory=set)
    """Longer than any test runs."""
    seconds: dict[bytes, asyncio.Queue[Connection]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    @property
    def proto(self) -> list[str]:
        return ["framed/1", f"epoch-{epoch_text(self.epoch)}/1"]

    def verify(self, header: bytes, now_ms: int) -> tuple[bool, dict[int, bytes]]:
        """Section 3: the checks in their order. Raises RefusedError."""
        warm, values = tlvs_of(header)
        networks = values[0xE0].decode(), values[0xE7].decode()
        from_network, to_network, secret = self.keys.get(values[0xE1].decode(), ("", "", bytes(32)))
        right = hmac.digest(secret, header[:-32] + bytes(32), "sha256")
        if not hmac.compare_digest(right, values[0xE3]) or networks != (from_network, to_network):
            raise RefusedError("bad_signature")
        if abs(int.from_bytes(values[0xE2], "big") - now_ms) > 60_000:
            raise RefusedError("clock_skew")
        if (to_network, values[0xE8].decode()) != (self.network, self.addressee):
            raise RefusedError("replay", "meant for somebody else")
        once = b"warm" * warm + values[0x05] + values.get(0xEA, b"") + values[0xE8]
        if 0xEC not in values and self.require_epoch:
            raise RefusedError("stale_epoch")
        if values.get(0xEC, self.epoch) != self.epoch:
            proof = hmac.digest(secret, b"crossnet stale_epoch" + self.epoch + once, "sha256").hex()
            raise RefusedError("stale_epoch", f"{epoch_text(self.epoch)} {proof}")
        if once in self.seen:
            raise RefusedError("replay", "here before")
        self.seen.add(once)
        return warm, values

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, for asyncio.start_server."""
        relay = Connection(reader, writer)
        try:
            if await self._preamble(relay):
                return  # a second connection, which its stream takes over
            writer.close()
        except RefusedError as error:
            self.log.append(error.reason)
            reason = error.reason.encode()
            try:
                async with asyncio.timeout(2):
                    await relay.say(capsule(REFUSED, bytes([len(reason)]) + reason + error.detail.encode()))
                    while await reader.read(4096):
                        pass
            except OSError:
                pass
            writer.close()
        except (EOFError, OSError):
            self.log.append("cut")
            writer.transport.abort()

    async def _preamble(self, relay: Connection) -> bool:
        start = await relay.exactly(16)
        if start[:12] != SIGNATURE:
            raise EOFError
        length = int.from_bytes(start[14:], "big")
        if length > 1008:
            raise RefusedError("protocol_error")
        warm, values = self.verify(start + await relay.exactly(length), time.time_ns() // 1_000_000)
        if 0xEB in values:
            waiting = self.seconds.get(values[0x05])
            if waiting is None:
                raise RefusedError("protocol_error")
            await relay.say(capsule(READY))
            waiting.put_nowait(relay)
            self.log.append("second")
            return True
        await relay.say(capsule(READY))
        if warm:
            values = await self._warm(relay)
        await self._stream(relay, values)
        return False

    async def _warm(self, relay: Connection) -> dict[int, bytes]:
        """Section 7."""
        self.log.append("warm")
        async for kind, value in relay.capsules():
            if kind == PING:
                await relay.say(capsule(PONG, value))
            elif kind == OPEN:
                warm, values = self.verify(value, time.time_ns() // 1_000_000)
                if warm or 0xEB in values:
                    raise RefusedError("protocol_error")
                self.log.append("open")
                return values
        raise EOFError

    async def _stream(self, relay: Connection, values: dict[int, bytes]) -> None:
        """Section 6."""
        payload, hello = b"", None
        async for kind, value in relay.capsules():
            if kind == DATA:
                payload += value
                hello = client_hello(payload)
                if hello is not None:
                    break
        assert hello is not None
        if hello[:2] != (values[0xE9], values[0x02].decode()):
            raise RefusedError("bad_signature", "another ClientHello")
        host, _, port = values[0xE4].decode().rpartition(":")
        try:
            service = await asyncio.open_connection(host, int(port))
        except OSError as error:
            raise RefusedError("dial_failed") from error
        address = ipaddress.ip_address(host).packed
        await relay.say(capsule(OPENED, struct.pack(">IH", 1, int(port)) + address))
        self.seconds[values[0x05]] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as group:
                down = group.create_task(self._down(relay, service[0]))
                await self._up(relay, service[1], payload, self.seconds[values[0x05]])
                await down
        except* (EOFError, OSError):
            service[1].transport.abort()
            raise EOFError from None
        finally:
            del self.seconds[values[0x05]]
        self.log.append("ok")

    async def _down(self, relay: Connection, service: asyncio.StreamReader) -> None:
        while data := await service.read(65536):
            await relay.say(capsule(DATA, data))
        await relay.say(capsule(FINAL_DATA))

    async def _up(
        self, relay: Connection, service: asyncio.StreamWriter, payload: bytes, seconds: asyncio.Queue[Connection]
    ) -> None:
        service.write(payload)
        reported = 0
        async for kind, value in relay.capsules():
            if kind in (DATA, FINAL_DATA):
                await self._deliver(service, kind, value)
            if kind == CONTINUED:
                async with asyncio.timeout(10):
                    second = await seconds.get()
                async for more, rest in second.capsules():
                    await self._deliver(service, more, rest)
                    if more == FINAL_DATA:
                        break
                second.writer.close()
            if kind in (FINAL_DATA, CONTINUED):
                await relay.say(capsule(FINISHED))
            if kind == DONE:
                service.close()
                return
            if self.through_turn and relay.received - reported >= 32 * 1024:
                reported = relay.received
                await relay.say(capsule(RECEIVED, struct.pack(">Q", reported)))

    async def _deliver(self, service: asyncio.StreamWriter, kind: int, value: bytes) -> None:
        service.write(value)
        await service.drain()
        if kind == FINAL_DATA:
            service.write_eof()
