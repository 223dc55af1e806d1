"""Bytes that never repeat, sent and received at any pace, and their digests."""

import asyncio
import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from sniproxy.engine import SocketStream

BLOCK = 256 * 1024
DEFAULT_BYTES = 16_000_000

BULK_BYTES = int(os.environ.get("CROSSNET_TEST_BYTES", DEFAULT_BYTES))
"""Bytes of a bulk stream each way. `make soak` sets a gigabyte; the default takes seconds on the shaped link."""

MANY_BYTES = BULK_BYTES // 3 if BULK_BYTES == DEFAULT_BYTES else BULK_BYTES
"""Bytes of many streams together, each way."""

SLOWEST_BYTES_S = 3_000_000
BULK_TIMEOUT_S = 40.0 + BULK_BYTES / SLOWEST_BYTES_S
"""After this time, a bulk stream that has not ended counts as stalled."""


@dataclass(frozen=True, slots=True)
class Sum:
    """The number of bytes, and their digest."""

    size: int
    digest: str


def content(size: int, seed: int) -> Iterator[bytes]:
    """Yield `size` bytes that never repeat, so that missing, repeated or swapped bytes change the digest."""
    key = hashlib.sha256(seed.to_bytes(8, "big")).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(min(BLOCK, size))
    while size:
        block = stream.update(zeros[:size])
        size -= len(block)
        yield block


@dataclass(frozen=True, slots=True)
class Pace:
    """The pace of writing or reading: pieces of a random size, with random pauses between them."""

    pieces: tuple[int, ...] = (BLOCK,)
    pause_probability: float = 0.0
    pause_s: float = 0.02

    async def hesitate(self, dice: random.Random) -> None:
        if self.pause_probability and dice.random() < self.pause_probability:
            await asyncio.sleep(dice.random() * self.pause_s)


FLAT_OUT = Pace()
HESITANT = Pace(pieces=(1, 700, 20_000, 100_000), pause_probability=0.3)
SLOW = Pace(pieces=(1000, 65_536), pause_probability=0.1)


async def send(stream: SocketStream, size: int, seed: int, pace: Pace = FLAT_OUT) -> Sum:
    """Send `size` bytes and end the direction."""
    dice = random.Random(seed)
    digest = hashlib.sha256()
    for block in content(size, seed):
        digest.update(block)
        rest = memoryview(block)
        while rest:
            piece = dice.choice(pace.pieces)
            await stream.send(rest[:piece])
            rest = rest[piece:]
            await pace.hesitate(dice)
    stream.shutdown_write()
    return Sum(size, digest.hexdigest())


async def receive(stream: SocketStream, seed: int = 0, pace: Pace = FLAT_OUT) -> Sum:
    """Read up to the end."""
    dice = random.Random(seed)
    digest, size = hashlib.sha256(), 0
    while data := await stream.recv(dice.choice(pace.pieces)):
        digest.update(data)
        size += len(data)
        await pace.hesitate(dice)
    return Sum(size, digest.hexdigest())
