"""The corpus of the fuzz target, and 200,000 mutations of it: no exception, no growth."""

import asyncio
import gc
import os
import random
from pathlib import Path

import pytest

from tests.fuzz.datagram import Target  # type: ignore[attr-defined]

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


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_200_000_mutated_packets_cause_no_error_and_no_growth(target: Target) -> None:
    draw = random.Random(1)

    def run(count: int) -> None:
        for number in range(count):
            target.run(mutated(draw), (number % 2 == 0,))

    run(100_000)
    gc.collect()
    before = resident()
    run(100_000)
    gc.collect()
    # Its memory is limited by configuration (32 MiB of answers, 36,864 prepared ones), and few of these packets use any.
    assert resident() - before < 16 << 20
    assert sum(target.metrics.queries.values()) >= 200_000
