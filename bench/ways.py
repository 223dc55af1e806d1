"""The ways from the load generator to the service: each has processes of its own, which are started anew in every round.

    direct            nothing between them
    relay             crossnet's relay alone, local route
    haproxy           HAProxy in TCP mode, routing by SNI: the comparison for the relay alone
    haproxy-splice    the same with splicing enabled
    gateway           relay → gateway, reached directly
    embedded          relay → embedded TURN server → gateway: the whole path
    coturn            relay → coturn → gateway

crossnet runs as users run it: `crossnet run -c FILE`, one process per role.
"""

import json
import random
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.worker import ROOT
from crossnet.config.sections import DEFAULT_DOMAIN
from crossnet.lab.program import Program
from discovery.model.addresses import format_endpoint, parse_address, parse_endpoint
from discovery.model.names import AddressTarget, encode
from sniproxy.engine.pipes import PIPE_BYTES

HOST = "127.0.0.1"
LOOPBACK = ["127.0.0.0/8"]
PASSWORD = "bench"  # for servers that listen on loopback while the benchmark runs

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Folders of haproxy and turnserver on Debian, which are not in an ordinary user's PATH."""

RELAY_PORTS = 100
"""Number of ports for allocations, below Linux's ephemeral ports; a gateway uses one."""

HAPROXY = """
global
    nbthread 1
    {pipes}
    log stdout format raw local0
defaults
    mode tcp
    log global
    option tcplog
    {splice}
    timeout connect 3s
    timeout client 1h
    timeout server 1h
frontend clients
    bind {host}:{port}
    tcp-request inspect-delay 5s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    tcp-request content reject
    use_backend service if {{ req.ssl_sni -i {name} }}
backend service
    server service-1 {host}:{service_port}
"""
"""One thread, as our processes have, and one log line per stream, as we write."""

HAPROXY_SPLICE = {"pipes": f"tune.pipesize {PIPE_BYTES}", "splice": "option splice-request\n    option splice-response"}
"""Pipes as large as ours. `splice-auto`, which the manual recommends, never spliced here (2.6.12)."""

_RELAY = {"id": "relay-1", "listen": f"{HOST}:0", "max_streams_per_client": 0, "new_streams_per_second": 0}
"""No limits per client: all clients of the benchmark have one address."""


class Way:
    """One way. `start` starts its processes and sets `address`; `end` may be called at any time."""

    def __init__(
        self, name: str, folder: Path, service_port: int, *, far_ms: float = 0.0, relay: Mapping[str, Any] | None = None
    ) -> None:
        """`name` is one of WAYS.

        Args:
            far_ms: delay between gateway and TURN server in one direction.
            relay: further settings of the relay's section.
        """
        self.name = name
        self._far_ms = far_ms
        self._relay = {**_RELAY, **(relay or {})}
        self._folder = folder
        self._service_port = service_port
        self.address: tuple[str, int] = (HOST, service_port)
        self.asked = self._asked("a")
        self.measured: tuple[str, ...] = ()
        """The processes that carry the bytes."""
        self._programs: dict[str, Program] = {}

    def start(self) -> None:
        """Start all processes. Raises ProgramError if one does not start."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _STARTS[self.name](self)

    def end(self) -> None:
        """Stop its processes and wait until they have ended."""
        for program in reversed(self._programs.values()):
            program.ask_to_end()
        for program in reversed(self._programs.values()):
            program.end()

    @property
    def pids(self) -> dict[str, int]:
        """The processes whose cost is measured."""
        return {part: self._programs[part].pid for part in self.measured}

    def complaints(self) -> str:
        """Return the last lines of all logs, for an error message."""
        return "".join(f"\n  {self.name}/{part}:\n{program.tail()}" for part, program in self._programs.items())

    # The kinds

    def _start_direct(self) -> None:
        pass

    def _start_relay(self) -> None:
        mesh = self._write("mesh.yaml", {"networks": [{"id": "a"}]})
        relay = {**self._relay, "deliver": [f"{HOST}/32:{self._service_port}"]}
        self.address = self._crossnet("relay", {"network": "a", "discovery": [mesh], "relay": relay})
        self.measured = ("relay",)

    def _start_haproxy(self) -> None:
        port = _free_port()
        splice = HAPROXY_SPLICE if self.name == "haproxy-splice" else {"pipes": "", "splice": ""}
        text = HAPROXY.format(host=HOST, port=port, name=self.asked, service_port=self._service_port, **splice)
        (self._folder / "haproxy.cfg").write_text(text)
        self.address = (HOST, port)
        self._run("haproxy", ["haproxy", "-db", "-f", "haproxy.cfg"]).wait_until("it", lambda: not _is_free(port))
        self.measured = ("haproxy",)

    def _start_gateway(self) -> None:
        mesh = self._write("mesh-b.yaml", {"networks": [{"id": "a"}, {"id": "b"}]})
        gateway = {"id": "gw-1", "listen": f"{HOST}:0", "allow": [f"{HOST}/32:{self._service_port}"]}
        keys = self._keys()
        listening = self._crossnet("gateway", {"network": "b", "discovery": [mesh], "keys": keys, "gateway": gateway})
        known = {"network": "b", "id": "gw-1", "address": format_endpoint(parse_address(HOST), listening[1])}
        mesh = self._write("mesh-a.yaml", {"networks": [{"id": "a"}, {"id": "b"}], "gateways": [known]})
        relay = {**self._relay, "direct": LOOPBACK}
        self.address = self._crossnet("relay", {"network": "a", "discovery": [mesh], "keys": keys, "relay": relay})
        self.asked = self._asked("b")
        self.measured = ("relay", "gateway")

    def _start_embedded(self) -> None:
        first, port = _free_range(), _free_port()
        turn = {
            "id": "turn-1",
            "listen": f"{HOST}:{port}",
            "advertise": self._turn_url(port),
            "relay_address": HOST,
            "ports": f"{first}-{first + RELAY_PORTS - 1}",
            "users": {"gw": self._password()},
            "allow_peers": LOOPBACK,
        }
        discovery = self._discovery()
        self._crossnet("turn", {"network": "a", "discovery": discovery, "turn": turn})
        self._start_ends(discovery, "turn", {})

    def _start_coturn(self) -> None:
        port, first = _free_port(pair=True), _free_range()
        last = first + RELAY_PORTS - 1
        (self._folder / "empty.conf").touch()
        # Without --cli-password coturn refuses to allow loopback peers, even with the command line switched off.
        options = [
            *("-c", "empty.conf", "-n", "--no-cli", "--cli-password=x", "--no-tls", "--no-dtls"),
            *(f"--listening-ip={HOST}", f"--relay-ip={HOST}", f"--listening-port={port}", "--allow-loopback-peers"),
            *(f"--min-port={first}", f"--max-port={last}", "--realm=bench", "--lt-cred-mech", f"--user=gw:{PASSWORD}"),
            *("--userdb=turndb", "--pidfile=turnserver.pid", "--log-file=stdout", "--simple-log"),
        ]
        self._run("coturn", ["turnserver", *options]).wait_until("it", lambda: not _is_free(port))
        discovery = self._discovery()
        server = {
            "id": "turn-1",
            "url": self._turn_url(port),
            "relay_addresses": [HOST],
            "port_min": first,
            "port_max": last,
        }
        self._start_ends(discovery, "coturn", {"turn_servers": [server]})

    def _start_ends(self, discovery: list[str], turn: str, more: dict[str, Any]) -> None:
        """Start the relay and the gateway of a path through a TURN server."""
        keys = self._keys()
        gateway = {
            "id": "gw-1",
            "allow": [f"{HOST}/32:{self._service_port}"],
            "turn": {"a": {"username": "gw", "password": self._password(), "allow": LOOPBACK}},
        }
        self._crossnet("gateway", {"network": "b", "discovery": discovery, "keys": keys, "gateway": gateway})
        relay = {**self._relay, "direct": LOOPBACK}
        self.address = self._crossnet(
            "relay", {"network": "a", "discovery": discovery, "keys": keys, "relay": relay, **more}
        )
        self.asked = self._asked("b")
        self.measured = ("relay", turn, "gateway")

    def _turn_url(self, port: int) -> str:
        """Return the URL of the TURN server for gateways, which leads through `bench.far` if there is a delay."""
        if self._far_ms:
            far = self._run("far", [sys.executable, str(ROOT / "bench" / "far.py"), str(port), str(self._far_ms)])
            far.wait_until("its port", lambda: bool(far.lines()))
            port = int(far.lines()[0])
        return f"turn:{HOST}:{port}?transport=tcp"

    def _discovery(self) -> list[str]:
        server = {"listen": f"{HOST}:0", "allow_addresses": LOOPBACK}
        listening = self._crossnet("discovery_server", {"network": "a", "discovery_server": server})
        return [f"http://{listening[0]}:{listening[1]}"]

    # Files and processes

    def _asked(self, network: str) -> str:
        return encode(AddressTarget(network, parse_address(HOST), self._service_port), DEFAULT_DOMAIN)

    def _keys(self) -> dict[str, Any]:
        file = self._folder / "ab-1.key"
        if not file.exists():
            file.touch(0o600)
            file.write_text(secrets.token_hex(32))
        return {"ab-1": {"file": file.name, "from": "a", "to": "b"}}

    def _password(self) -> dict[str, str]:
        file = self._folder / "turn.password"
        file.touch(0o600)
        file.write_text(PASSWORD)
        return {"file": file.name}

    def _write(self, file: str, document: dict[str, Any]) -> str:
        (self._folder / file).write_text(yaml.safe_dump(document, sort_keys=False))
        return file

    def _crossnet(self, role: str, document: dict[str, Any]) -> tuple[str, int]:
        """Run one role, wait until it has started, and return where it listens; ("", 0) for a role that does not listen."""
        self._write(f"{role}.yaml", {**document, "admin": f"{HOST}:0", "drain": 0})
        program = self._run(role, [sys.executable, "-m", "crossnet", "run", "-c", f"{role}.yaml"])
        program.wait_until("its start", lambda: _started(program) is not None)
        listening = (_started(program) or {})["listening"].get(role)
        if listening is None:
            return "", 0
        address, port = parse_endpoint(listening[0])
        return str(address), port

    def _run(self, part: str, command: list[str]) -> Program:
        program = self._programs[part] = Program(part, command, self._folder)
        program.start()
        return program


_STARTS: dict[str, Callable[[Way], None]] = {
    "direct": Way._start_direct,
    "relay": Way._start_relay,
    "haproxy": Way._start_haproxy,
    "haproxy-splice": Way._start_haproxy,
    "gateway": Way._start_gateway,
    "embedded": Way._start_embedded,
    "coturn": Way._start_coturn,
}

WAYS = tuple(_STARTS)

_NEEDS = {"haproxy": "haproxy", "haproxy-splice": "haproxy", "coturn": "turnserver"}


def missing(name: str) -> str | None:
    """Return the program that a way needs if it is not installed, otherwise None."""
    program = _NEEDS.get(name)
    return None if program is None or shutil.which(program) else program


def _started(program: Program) -> dict[str, Any] | None:
    for line in program.lines():
        if '"event":"started"' in line:
            event: dict[str, Any] = json.loads(line)
            return event
    return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port(*, pair: bool = False) -> int:
    """Return a free port below the ephemeral ones, for a server that cannot report which port it got."""
    while True:
        port = random.randrange(10_000, 20_000, 2)
        if _is_free(port) and (not pair or _is_free(port + 1)):
            return port


def _free_range() -> int:
    """Return the first port of a range. Some ports in it may be in use: TURN servers then try the next one."""
    while True:
        first = random.randrange(20_000, 32_000, RELAY_PORTS)
        if _is_free(first):
            return first
