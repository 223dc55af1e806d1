"""The embedded TURN server compared with coturn: set-up time, streams per second, throughput, CPU time per stream and per GB.

    python -m bench.turn                         both, three rounds, about two minutes
    python -m bench.turn --rounds 5 --only embedded

In each round each server is started anew, with its default logging, and gets the same load from the same generator: one control
connection with one allocation. A stream consists of a peer's connect to the relayed address, the ConnectionAttempt, a data
connection with its ConnectionBind, a byte from client to peer, and the end. README.md lists known distortions. In addition, the
generator is Python and costs more than either server, so it limits the streams per second. Compare the CPU time per stream.
"""

import argparse
import json
import multiprocessing
import os
import queue
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.meter import cost
from turnreg.stun.auth import long_term_key
from turnreg.stun.message import TRANSPORT_TCP, Attribute, Message, MessageClass, Method, frame_length

HOST = "127.0.0.1"
USER, PASSWORD, REALM = "u", "p", "bench"
FIRST_PORT, LAST_PORT = 20_000, 29_999
TIMEOUT_S = 20.0
BLOCK = bytes(1 << 20)


# -- servers


def serve_embedded(port: int) -> None:
    """Run the embedded server until killed."""
    import uvloop

    from crossnet import logs
    from crossnet.process import spare_collections
    from discovery.model.addresses import TargetList
    from turnreg.server import TurnServer, TurnServerConfig

    logs.set_up(style="json", level="info")
    spare_collections()
    config = TurnServerConfig(
        listen=((HOST, port),),
        relay_addresses=(HOST,),
        realm=REALM,
        port_min=FIRST_PORT,
        port_max=LAST_PORT,
        users={USER: PASSWORD},
        allowed_peers=TargetList.parse(["127.0.0.0/8"]),
    )

    async def main() -> None:
        await (await TurnServer.open(config)).run()

    uvloop.run(main())


def _command(server: str, port: int, directory: Path) -> list[str]:
    if server == "embedded":
        return [sys.executable, "-m", "bench.turn", "--serve", str(port)]
    (directory / "empty.conf").touch()
    return [
        *("turnserver", "-c", str(directory / "empty.conf"), "-n", f"--listening-ip={HOST}", f"--relay-ip={HOST}"),
        *(f"--listening-port={port}", f"--min-port={FIRST_PORT}", f"--max-port={LAST_PORT}", f"--realm={REALM}"),
        *("--lt-cred-mech", f"--user={USER}:{PASSWORD}", "--allow-loopback-peers", "--cli-password=x", "--no-cli"),
        *("--no-tls", "--no-dtls", "--no-udp", "--simple-log", "--stale-nonce=3600"),
        *(f"--pidfile={directory / 'pid'}", f"--userdb={directory / 'db'}", f"--log-file={directory / 'log'}"),
    ]


@contextmanager
def running(server: str) -> Iterator[tuple[int, int]]:
    """Run a server while the block runs. Yields its port and pid."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="crossnet-bench-") as name, (Path(name) / "output").open("wb") as output:
        process = subprocess.Popen(_command(server, port, Path(name)), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while True:
                try:
                    socket.create_connection((HOST, port)).close()
                    break
                except ConnectionRefusedError:
                    if time.monotonic() > deadline or process.poll() is not None:
                        said = (Path(name) / "output").read_text(errors="replace")[-500:]
                        raise RuntimeError(f"{server} did not start: {said}") from None
                    time.sleep(0.02)
            yield port, process.pid
        finally:
            process.kill()
            process.wait()


# -- the client


class Client:
    """A control connection with an allocation that permits this host, and a thread that receives its ConnectionAttempts."""

    def __init__(self, port: int) -> None:
        self.server = (HOST, port)
        self.key = long_term_key(USER, REALM, PASSWORD)
        self.nonce = ""
        self.sock = socket.create_connection(self.server, timeout=TIMEOUT_S)
        self._attempts: dict[int, bytes] = {}
        self._waiting: dict[int, queue.SimpleQueue[bytes]] = {}
        self._lock = threading.Lock()
        bare = Message(Method.ALLOCATE, MessageClass.REQUEST, secrets.token_bytes(12)).with_first_byte(
            Attribute.REQUESTED_TRANSPORT, TRANSPORT_TCP
        )
        self.sock.sendall(bare.pack())
        self.nonce = _receive(self.sock).text(Attribute.NONCE) or ""
        self.sock.sendall(self.signed(bare))
        answer = _receive(self.sock)
        relayed = answer.xor_address(Attribute.XOR_RELAYED_ADDRESS)
        if relayed is None:
            raise RuntimeError(f"no allocation: {answer.error}")
        self.relayed = relayed
        permission = Message(Method.CREATE_PERMISSION, MessageClass.REQUEST, secrets.token_bytes(12))
        self.sock.sendall(self.signed(permission.with_xor_address(Attribute.XOR_PEER_ADDRESS, (HOST, 0))))
        if (error := _receive(self.sock).error) is not None:
            raise RuntimeError(f"no permission: {error}")
        self.sock.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()

    def signed(self, message: Message) -> bytes:
        message = message.with_text(Attribute.USERNAME, USER).with_text(Attribute.REALM, REALM)
        return message.with_text(Attribute.NONCE, self.nonce).pack(integrity_key=self.key)

    def _listen(self) -> None:
        while True:
            try:
                message = _receive(self.sock)
            except (OSError, EOFError):
                return
            peer = message.xor_address(Attribute.XOR_PEER_ADDRESS)
            if message.method == Method.CONNECTION_ATTEMPT and peer is not None:
                with self._lock:
                    waiting = self._waiting.setdefault(peer[1], queue.SimpleQueue())
                waiting.put(message.get(Attribute.CONNECTION_ID) or b"")

    def stream(self) -> tuple[socket.socket, socket.socket]:
        """Open one stream. Returns the peer's end and the bound data connection."""
        peer = socket.create_connection(self.relayed, timeout=TIMEOUT_S)
        port = peer.getsockname()[1]
        with self._lock:
            waiting = self._waiting.setdefault(port, queue.SimpleQueue())
        connection_id = waiting.get(timeout=TIMEOUT_S)
        with self._lock:
            del self._waiting[port]
        data = socket.create_connection(self.server, timeout=TIMEOUT_S)
        bind = Message(Method.CONNECTION_BIND, MessageClass.REQUEST, secrets.token_bytes(12))
        data.sendall(self.signed(bind.with_bytes(Attribute.CONNECTION_ID, connection_id)))
        answer = _receive(data)
        if answer.message_class != MessageClass.SUCCESS:
            raise RuntimeError(f"not bound: {answer.error}")
        return peer, data

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def _receive(sock: socket.socket) -> Message:
    """Read exactly one message."""
    data = b""
    while True:
        length = frame_length(data[:8])
        if length is not None and len(data) == length:
            return Message.parse(data)
        more = sock.recv((length or 20) - len(data))
        if not more:
            raise EOFError
        data += more


# -- questions


def set_up(client: Client, pid: int, count: int) -> dict[str, float]:
    """Open streams one after the other. Measures the time from the peer's connect to its first byte."""
    took = []
    before = cost(pid).cpu_s
    for _ in range(count):
        began = time.perf_counter()
        peer, data = client.stream()
        data.sendall(b"x")
        peer.recv(1)
        took.append(time.perf_counter() - began)
        peer.close()
        data.close()
    used = cost(pid).cpu_s - before
    return {
        "set_up_ms_p50": statistics.median(took) * 1e3,
        "set_up_ms_p99": sorted(took)[int(len(took) * 0.99)] * 1e3,
        "cpu_us_per_stream_1": used / count * 1e6,
    }


def at_once(client: Client, pid: int, count: int, parallel: int) -> dict[str, float]:
    """Open streams from several threads."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(count // parallel):
                peer, data = client.stream()
                data.sendall(b"x")
                peer.recv(1)
                peer.close()
                data.close()
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(parallel)]
    before, began = cost(pid).cpu_s, time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, used = time.perf_counter() - began, cost(pid).cpu_s - before
    if failures:
        raise failures[0]
    return {"streams_per_s": count / took, f"cpu_us_per_stream_{parallel}": used / count * 1e6}


def throughput(client: Client, pid: int, streams: int, seconds: float) -> dict[str, float]:
    """Send from peers to the client for this many seconds. Sender and receiver are separate processes."""
    pairs = [client.stream() for _ in range(streams)]
    total = multiprocessing.get_context("fork").Value("Q", 0)
    context = multiprocessing.get_context("fork")
    sink = context.Process(target=_sink, args=([data for _, data in pairs], total))
    source = context.Process(target=_source, args=([peer for peer, _ in pairs], seconds))
    before, began = cost(pid).cpu_s, time.perf_counter()
    sink.start()
    source.start()
    for peer, data in pairs:
        peer.close()
        data.close()
    source.join()
    sink.join()
    took, used = time.perf_counter() - began, cost(pid).cpu_s - before
    if sink.exitcode or source.exitcode:
        raise RuntimeError("a stream was cut")
    gigabytes = total.value / 1e9
    return {f"gbit_per_s_{streams}": gigabytes * 8 / took, f"cpu_s_per_gb_{streams}": used / gigabytes}


def _each(work: Callable[[socket.socket], None], socks: list[socket.socket]) -> None:
    threads = [threading.Thread(target=work, args=(sock,)) for sock in socks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _source(socks: list[socket.socket], seconds: float) -> None:
    until = time.monotonic() + seconds

    def send(sock: socket.socket) -> None:
        sock.settimeout(None)
        while time.monotonic() < until:
            sock.sendall(BLOCK)
        sock.shutdown(socket.SHUT_WR)
        time.sleep(1)  # coturn drops buffered data when it gets a FIN: the sink counts what arrived

    _each(send, socks)
    os._exit(0)


def _sink(socks: list[socket.socket], total: Any) -> None:
    def receive(sock: socket.socket) -> None:
        sock.settimeout(None)
        buffer, count = bytearray(1 << 20), 0
        try:
            while size := sock.recv_into(buffer):
                count += size
        except ConnectionResetError:
            pass  # coturn ends connections like this
        with total.get_lock():
            total.value += count

    _each(receive, socks)
    os._exit(0)


# -- the run


def measure(server: str, count: int, seconds: float) -> dict[str, float]:
    """Run all measurements of one server once."""
    figures: dict[str, float] = {}
    with running(server) as (port, pid), ExitStack() as stack:
        client = Client(port)
        stack.callback(client.close)
        set_up(client, pid, 50)  # warm caches, and Python's specialised bytecode
        figures |= set_up(client, pid, count)
        figures |= at_once(client, pid, count, 16)
        for streams in (1, 16):
            figures |= throughput(client, pid, streams, seconds)
    return figures


def print_table(samples: dict[str, list[dict[str, float]]]) -> None:
    """Print medians over the rounds with the lowest and highest value; for two servers also the median of the ratios per round."""
    print(f"{'':24}" + "".join(f"{server:>34}" for server in samples) + f"{'ratio':>10}" * (len(samples) == 2))
    for name in next(iter(samples.values()))[0]:
        columns = [[sample[name] for sample in rounds] for rounds in samples.values()]
        cells = [f"{statistics.median(values):12.3f} ({min(values):.3f} - {max(values):.3f})" for values in columns]
        line = f"{name:24}" + "".join(f"{cell:>34}" for cell in cells)
        if len(columns) == 2:
            line += f"{statistics.median(one / other for one, other in zip(*columns, strict=True)):10.2f}"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.turn", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=2000, help="streams per question")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each throughput measurement")
    parser.add_argument("--only", choices=("embedded", "coturn"), action="append")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve_embedded(options.serve)
        return 0
    servers = options.only or ["embedded", "coturn"]
    machine = describe()
    print(f"{machine['cores']} cores, {machine['cpu']}, Linux {machine['kernel']}, {machine['coturn']}")
    print(f"1 MiB pipes available: {machine['pipes_of_1_mib']} (as {machine['user']} user)")
    samples: dict[str, list[dict[str, float]]] = {server: [] for server in servers}
    for number in range(options.rounds):
        for server in servers if number % 2 == 0 else reversed(servers):
            samples[server].append(measure(server, options.streams, options.seconds))
    print_table(samples)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "samples": samples}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
