"""The fuzz target's corpus, and 200,000 mutations of it: no exception, no growth."""

import asyncio
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from tests.fuzz.datagram import Target

CORPUS = [path.read_bytes() for path in sorted((Path(__file__).parent / "datagram").iterdir())]


@pytest.fixture
def target() -> Target:
    loop = asyncio.new_event_loop()
    loop.close()
    return Target(loop)


def mutated(draw: random.Random) -> bytes:
    data = bytearray(draw.choice(CORPUS))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(1, len(data) + 1)
        match draw.randrange(4):
            case 0:
                data[at:] = b""
            case 1 if at < len(data):
                data[at] = draw.randrange(256)
            case 2:
                data[at:at] = draw.randbytes(draw.randint(1, 8))
            case _:
                other = draw.choice(CORPUS)
                data[at:] = other[draw.randrange(len(other)) :]
    return bytes(data)


def test_the_corpus(target: Target) -> None:
    for data in CORPUS:
        for _ in range(3):
            target.run(data)


def test_mutated_packets_neither_raise_nor_make_it_grow(target: Target) -> None:
    """Few of them in every run; FUZZ_PACKETS=200000 pytest tests/fuzz for many."""
    draw = random.Random(1)
    count = int(os.environ.get("FUZZ_PACKETS", "4000"))
    for _ in range(count // 2):
        target.run(mutated(draw))
    tracemalloc.start()
    for _ in range(count // 4):
        target.run(mutated(draw))
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(count // 4):
        target.run(mutated(draw))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # What it keeps is bounded by configuration (32 MiB of answers, 36,864 prepared ones), and reached by few of these.
    assert grown < 16 << 20
