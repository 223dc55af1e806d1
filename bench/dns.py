"""dnsgw compared with unbound, dnsmasq and dnsdist: CPU time per query, rate, and latency.

Each server runs on one core. dnsperf and the common upstream (an unbound that serves one zone from memory) run on the
other, so that their cost is not the server's. The cost is the server's own CPU time (/proc/PID/stat, user and system)
divided by the queries it completed. Rates depend on dnsperf and on other processes of the machine, so compare the cost.
The servers take turns within a round, and the best of all rounds counts.

    python -m bench.dns [--rounds 3] [--seconds 3] [--servers dnsgw,unbound] [--cases own,cached,missed] [--json FILE]
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

ZONE = "example.test"  # upstream answers for any name in it
DOMAIN = "svc.mesh.internal"
NAMES = 1000
RATES = (5000, 20000)  # queries per second at which the 99th percentile is taken
START_S = 10.0
_TICK = os.sysconf("SC_CLK_TCK")
_SERVER_CPU, _LOAD_CPU = "0", "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One server under one load."""

    server: str
    case: str
    queries_per_s: float
    cpu_us: float
    """CPU time of the server per completed query."""

    lost: int
    p99_us: dict[int, float]
    """By the rate of the load, in queries per second."""


# The servers. Each has a command and a configuration file, and answers every own name with 10.0.0.9.


def _unbound(port: int, upstream: int, directory: Path) -> list[str]:
    own = "\n".join(f'  local-data: "{name}. A 10.0.0.9"' for name in _own_names())
    return _unbound_command(
        directory,
        f"""
server:
  interface: 127.0.0.1@{port}
  msg-cache-size: 64m
  rrset-cache-size: 64m
  do-not-query-localhost: no
  local-zone: "{DOMAIN}" static
  local-zone: "test." nodefault
{own}
forward-zone:
  name: "."
  forward-addr: 127.0.0.1@{upstream}
""",
        f"unbound-{port}.conf",
    )


def _unbound_command(directory: Path, text: str, name: str) -> list[str]:
    common = f"""
  username: ""
  chroot: ""
  use-syslog: no
  logfile: "{directory}/unbound.log"
  pidfile: ""
  num-threads: 1
  do-daemonize: no
  verbosity: 0
  module-config: "iterator"
  so-reuseport: no
remote-control:
  control-enable: no
"""
    (directory / name).write_text(text.replace("server:", "server:" + common.split("remote-control")[0], 1))
    return ["unbound", "-d", "-c", str(directory / name)]


def _upstream(port: int, directory: Path) -> list[str]:
    text = f"""
server:
  interface: 127.0.0.1@{port}
  local-zone: "test." nodefault
  local-zone: "{ZONE}" redirect
  local-data: "{ZONE}. 300 IN A 192.0.2.1"
"""
    return _unbound_command(directory, text, "upstream.conf")


def _dnsmasq(port: int, upstream: int, directory: Path) -> list[str]:
    hosts = directory / "hosts"
    hosts.write_text("".join(f"10.0.0.9 {name}\n" for name in _own_names()))
    return [
        *("dnsmasq", "-k", "-C", "/dev/null", "-p", str(port), "--listen-address=127.0.0.1", "--bind-interfaces"),
        *("--no-resolv", "--no-hosts", f"--addn-hosts={hosts}", f"--server=127.0.0.1#{upstream}", "--pid-file"),
        *("--cache-size=10000", "--user=root", "--dns-forward-max=4096"),
    ]


def _dnsdist(port: int, upstream: int, directory: Path) -> list[str]:
    (directory / "dnsdist.conf").write_text(
        f"""
setLocal("127.0.0.1:{port}")
newServer{{address="127.0.0.1:{upstream}", checkName="up.{ZONE}."}}
getPool(""):setCache(newPacketCache(100000))
addAction(makeRule("{DOMAIN}"), SpoofAction("10.0.0.9"))
setSecurityPollSuffix("")
"""
    )
    return [
        "dnsdist",
        "--supervised",
        "--disable-syslog",
        "-C",
        str(directory / "dnsdist.conf"),
        "-u",
        "root",
        "-g",
        "root",
    ]


def _dnsgw(port: int, upstream: int, directory: Path) -> list[str]:
    del directory
    return [sys.executable, "-m", "bench.dns", "--serve", str(port), str(upstream)]


SERVERS = {"dnsgw": _dnsgw, "unbound": _unbound, "dnsmasq": _dnsmasq, "dnsdist": _dnsdist}


async def _serve(port: int, upstream: int) -> None:
    """Run the dnsgw that is measured, with access list, rate limit and metrics as in production."""
    from prometheus_client import CollectorRegistry

    from discovery.model.mesh import Kind, Mesh, NetworkSpec, Record, RelaySpec
    from dnsgw import DnsConfig, DnsServer

    loopback = ip_address("127.0.0.1")
    server = DnsServer(
        DnsConfig(
            network="a",
            domain=DOMAIN,
            listen=((loopback, port),),
            upstream=((loopback, upstream),),
            allow=(ip_network("10.0.0.0/8"), ip_network("127.0.0.0/8")),
            rate_limit=10_000_000,
        ),
        registry=CollectorRegistry(),
    )
    await server.open()
    relay = RelaySpec(addresses=["10.0.0.9"], ports=[443])
    server.apply(
        Mesh.of(
            [
                Record(kind=Kind.NETWORK, network="b", id="b", revision=1, spec=NetworkSpec()),
                Record(kind=Kind.RELAY, network="a", id="relay-1", revision=2, spec=relay),
            ]
        )
    )
    await server.run()


# The loads, as files of questions for dnsperf.


def _own_names() -> list[str]:
    return [f"p8443-10-{n // 250}-{n % 250}-5.b.{DOMAIN}" for n in range(NAMES)]


def _questions(case: str, directory: Path) -> Path:
    """Write the questions. For `missed`, there are more names than one run asks for, and new ones each time."""
    stamp = time.time_ns()
    match case:
        case "own":
            names = _own_names()
        case "cached":
            names = [f"n{n}.{ZONE}" for n in range(NAMES)]
        case _:
            names = [f"n{n}-{stamp}.{ZONE}" for n in range(400_000)]
    path = directory / f"{case}.txt"
    path.write_text("".join(f"{name} A\n" for name in names))
    return path


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _dnsperf(port: int, questions: Path, seconds: float, *options: str) -> str:
    command = ["taskset", "-c", _LOAD_CPU, "dnsperf", "-s", "127.0.0.1", "-p", str(port), "-d", str(questions)]
    done = subprocess.run(
        [*command, "-l", str(seconds), "-T", "1", *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 30,
    )
    return done.stdout


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    return float(found[1]) if found else 0.0


def _p99_us(output: str) -> float:
    latencies = sorted(float(line.split()[-1]) for line in output.splitlines() if line.startswith("> NOERROR"))
    return latencies[int(len(latencies) * 0.99)] * 1e6 if latencies else 0.0


@contextlib.contextmanager
def _started(command: list[str], port: int, cpu: str) -> Iterator[int]:
    process = subprocess.Popen(["taskset", "-c", cpu, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not answer on port {port}")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    """Return whether a DNS server answers at this port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.1)
        try:
            sock.connect(("127.0.0.1", port))
            sock.send(bytes.fromhex("000101000001000000000000") + b"\x09localhost\0\0\1\0\1")
            return bool(sock.recv(512))
        except OSError:
            return False


def _free_port() -> int:
    """Return a port that is free for UDP and TCP, below the ephemeral ports."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            try:
                udp.bind(("127.0.0.1", port))
                tcp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free")


def measure(server: str, case: str, upstream: int, seconds: float, directory: Path) -> Measured:
    """Start a server, warm it up, and load it."""
    port = _free_port()
    with _started(SERVERS[server](port, upstream, directory), port, _SERVER_CPU) as pid:
        questions = _questions(case, directory)
        if case != "missed":
            _dnsperf(port, questions, 1, "-c", "8")
        before = _cpu_s(pid)
        output = _dnsperf(port, questions, seconds, "-c", "8")
        used_s = _cpu_s(pid) - before
        completed = _number(r"Queries completed:\s+(\d+)", output)
        p99 = {}
        for rate in RATES:
            if case == "missed":
                questions = _questions(case, directory)
            p99[rate] = _p99_us(_dnsperf(port, questions, 2, "-c", "8", "-Q", str(rate), "-v"))
        return Measured(
            server=server,
            case=case,
            queries_per_s=_number(r"Queries per second:\s+([\d.]+)", output),
            cpu_us=used_s / max(completed, 1) * 1e6,
            lost=int(_number(r"Queries lost:\s+(\d+)", output)),
            p99_us=p99,
        )


def measure_mixed(server: str, upstream: int, directory: Path) -> float:
    """Return the 99th percentile of own names, in µs, at 5,000 a second while 1,000 a second are forwarded."""
    port = _free_port()
    with _started(SERVERS[server](port, upstream, directory), port, _SERVER_CPU):
        own, missed = _questions("own", directory), _questions("missed", directory)
        _dnsperf(port, own, 1, "-c", "8")
        beside = subprocess.Popen(
            [
                *("taskset", "-c", _LOAD_CPU, "dnsperf", "-s", "127.0.0.1", "-p", str(port)),
                *("-d", str(missed), "-l", "4", "-Q", "1000"),
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            return _p99_us(_dnsperf(port, own, 3, "-c", "8", "-Q", "5000", "-v"))
        finally:
            beside.kill()
            beside.wait()


def main() -> None:
    """Run the measurements and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--cases", default="own,cached,missed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        import uvloop

        uvloop.run(_serve(*options.serve))
        return
    servers = [name for name in options.servers.split(",") if name == "dnsgw" or shutil.which(name)]
    best: dict[tuple[str, str], Measured] = {}
    mixed: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        upstream = _free_port()
        with _started(_upstream(upstream, directory), upstream, _LOAD_CPU):
            for _ in range(options.rounds):
                for case in options.cases.split(","):
                    for server in servers:
                        result = measure(server, case, upstream, options.seconds, directory)
                        known = best.get((case, server))
                        best[case, server] = result if known is None else _better(known, result)
                for server in servers:
                    mixed[server] = min(mixed.get(server, 1e9), measure_mixed(server, upstream, directory))
    print(f"{'case':8}{'server':10}{'q/s':>9}{'µs/q':>8}{'of unbound':>12}{'lost':>6}", *(f"p99@{r:<6}" for r in RATES))
    for (case, server), got in sorted(best.items()):
        unbound = best.get((case, "unbound"))
        ratio = f"{got.cpu_us / unbound.cpu_us:.2f}" if unbound else "-"
        p99 = " ".join(f"{got.p99_us[rate]:<10.0f}" for rate in RATES)
        print(f"{case:8}{server:10}{got.queries_per_s:9.0f}{got.cpu_us:8.1f}{ratio:>12}{got.lost:6} {p99}")
    for server, p99_us in mixed.items():
        print(f"p99 of own names at 5,000/s with 1,000/s forwarded, {server}: {p99_us:.0f} µs")
    if options.json:
        machine = {"kernel": platform.release(), "python": platform.python_version(), "cpus": os.cpu_count()}
        results = [asdict(result) for result in best.values()]
        options.json.write_text(json.dumps({"machine": machine, "results": results, "mixed_p99_us": mixed}, indent=1))


def _better(one: Measured, other: Measured) -> Measured:
    """Return the best of each figure: interference only ever makes a measurement worse."""
    return Measured(
        server=one.server,
        case=one.case,
        queries_per_s=max(one.queries_per_s, other.queries_per_s),
        cpu_us=min(one.cpu_us, other.cpu_us),
        lost=min(one.lost, other.lost),
        p99_us={rate: min(one.p99_us[rate], other.p99_us[rate]) for rate in one.p99_us},
    )


if __name__ == "__main__":
    main()
