"""The effect of warm streams: a new client's time to the first byte, with a TURN server that is far from the gateway.

    python -m bench.warm                        embedded and coturn, 25 ms one way, with no, one and two warm streams
    python -m bench.warm --far 50 --pools 0 2

The whole path as in the other benchmarks, with a delay between gateway and TURN server (bench.far). Clients connect one at a
time, with pauses in which the used warm stream is replaced ("single"), and sixteen at once ("burst"), of which `pool` find a
warm stream. Every round measures every way in turn; figures are medians over the rounds. `rtt` is the round trip between
gateway and TURN server: no stream can have its first byte in less than one.
"""

import argparse
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import machine
from bench.abuse import part
from bench.exchange import client_hello
from bench.questions import PROBE_EVERY_S, PROBE_TIMEOUT_S
from bench.ways import Way
from crossnet.lab.program import ProgramError

TURNS = ("embedded", "coturn")
FIRST = 8
"""Clients that are not measured: an allocation has no warm streams before its first use, and there are two allocations."""
SINGLES = 20
BURST = 16
SETTLE_RTTS = 6
"""Round trips between two clients: opening a warm stream takes three."""


class Measured:
    """First-byte times of one way, by kind of measurement."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = {"single_p50": [], "single_p99": [], "burst_p50": [], "burst_p99": []}


def ask(way: Way, far_ms: float, measured: Measured) -> None:
    """Run the clients of one round and record their times. Raises OSError or EOFError if one is refused."""
    pause = SETTLE_RTTS * 2 * far_ms / 1000 + 0.05
    hello = client_hello(way.asked)
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    done = 0
    while done < FIRST:
        try:
            first_byte_ms(way.address, hello)
            done += 1
        except (OSError, EOFError):
            if time.monotonic() > deadline:
                raise
            time.sleep(PROBE_EVERY_S)
    took = []
    for _ in range(SINGLES):
        time.sleep(pause)
        took.append(first_byte_ms(way.address, hello))
    measured.ms["single_p50"].append(statistics.median(took))
    measured.ms["single_p99"].append(max(took))
    time.sleep(pause)
    with ThreadPoolExecutor(BURST) as clients:
        burst = sorted(clients.map(lambda _: first_byte_ms(way.address, hello), range(BURST)))
    measured.ms["burst_p50"].append(statistics.median(burst))
    measured.ms["burst_p99"].append(burst[-1])


def first_byte_ms(address: tuple[str, int], hello: bytes) -> float:
    """Run one client, which sends only a ClientHello, as TLS clients do. Returns the time from connect to the first byte."""
    began = time.monotonic()
    with socket.create_connection(address, timeout=30) as client:
        client.sendall(hello)
        if client.recv(1) != hello[:1]:
            raise EOFError("refused: no service at the far end")
        return (time.monotonic() - began) * 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements, and print a table and JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.warm", description="First-byte time with and without warm streams."
    )
    parser.add_argument("--far", type=float, default=25.0, help="milliseconds one way (default: %(default)s)")
    parser.add_argument("--pools", type=int, nargs="+", default=[0, 1, 2], help="sizes of relay.pool")
    parser.add_argument("--turns", nargs="+", default=list(TURNS), choices=TURNS)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    measured = {(turn, pool): Measured() for turn in given.turns for pool in given.pools}
    with part("service") as service, tempfile.TemporaryDirectory(prefix="crossnet-warm-") as folder:
        port = int(service.line())
        for number in range(given.rounds):
            for turn, pool in measured:
                way = Way(turn, Path(folder) / f"{number}-{turn}-{pool}", port, far_ms=given.far, relay={"pool": pool})
                try:
                    way.start()
                    ask(way, given.far, measured[turn, pool])
                except (ProgramError, OSError, EOFError) as error:
                    print(f"{turn}, pool {pool}: {error}{way.complaints()}", file=sys.stderr)
                    return 1
                finally:
                    way.end()
                print(f"round {number + 1}/{given.rounds}: {turn}, pool {pool}", file=sys.stderr)
    rtt = 2 * given.far
    print(
        f"{'TURN server':<12}{'pool':>5}" + "".join(f"{what:>14}" for what in Measured().ms) + f"   ms; rtt {rtt:g} ms"
    )
    rows = []
    for (turn, pool), found in measured.items():
        row = {what: round(statistics.median(values), 1) for what, values in found.ms.items()}
        rows.append({"turn": turn, "pool": pool, **row})
        shown = "".join(f"{value:>8.1f}{value / rtt:>5.1f}r" for value in row.values())
        print(f"{turn:<12}{pool:>5}{shown}")
    print(json.dumps({"machine": machine.describe(), "rtt_ms": rtt, "rounds": given.rounds, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
