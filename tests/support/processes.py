"""A mesh of real processes: discovery, a TURN server, relay and gateways. Each is a `crossnet run` or Debian's coturn.

    with running_mesh(Mesh(folder, Loopback(), turn="coturn")) as mesh:
        name = mesh.name(await mesh.serve(handle, closing))
        client = await mesh.dial(name)

The configuration is that of the lab (`crossnet.lab.parts`) with the changes of a test. A `Ground` says where the parts run:
on addresses of the loopback interface, or on hosts of their own (`tests.support.hosts`). Clients and services belong to the
test: they are sockets in its own loop, created on their hosts. Every process is killed by its pid, or by the kernel if the test
run itself is killed.
"""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from crossnet.lab import topology
from crossnet.lab.certificates import Authority
from crossnet.lab.parts import Parts
from crossnet.lab.program import Program
from sniproxy.engine import Listener, SocketStream
from sniproxy.engine import connect as connect_wire
from tests.support.hellos import client_hello
from tests.support.waiting import LIMIT_S, eventually, wait_until

TURNS = [
    pytest.param("coturn", marks=[pytest.mark.interop, pytest.mark.needs("turnserver")]),
    pytest.param("embedded"),
]
"""The TURN servers. The same tests must pass with both."""

DOMAIN = "svc.mesh.internal"
ASK_TIMEOUT_S = 2.0
END_TIMEOUT_S = 20.0

SECOND_ADMIN_PORT = 8795

Change = Callable[[dict[str, Any]], None]
"""Modifies a part's configuration before it is written."""


class Ground(Protocol):
    """Where the parts run."""

    plan: topology.Plan
    second_gateway: str
    hop: str
    """Addresses of gateway-2 and hop; the other addresses are in the plan."""

    def on(self, part: str) -> AbstractContextManager[None]:
        """Enter a part's host while the block runs: sockets and processes created in the block belong to that host."""


class Loopback:
    """Runs all parts on unused addresses of the loopback interface."""

    def __init__(self) -> None:
        self.plan = topology.Loopback().plan
        self.second_gateway = self.hop = self.plan.gateway

    def on(self, part: str) -> AbstractContextManager[None]:
        """Do nothing: all parts are on this host."""
        del part
        return nullcontext()


class Part(Program):
    """One process, with operations that only tests need."""

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, not to its children."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, as in a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def exit_code(self) -> int:
        """Wait until it ends, and return its exit code."""
        assert self._process is not None
        return self._process.wait(END_TIMEOUT_S)

    @property
    def alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def descriptors(self) -> int:
        """Return the number of its open descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Mesh:
    """The processes of one test. The parts are discovery, turn, relay, gateway, gateway-2, dns and hop."""

    def __init__(
        self,
        folder: Path,
        ground: Ground,
        *,
        turn: str = "embedded",
        gateways: int = 1,
        late_s: float = 0.0,
        coturn_options: Sequence[str] = (),
        dns: bool = False,
        changes: Mapping[str, Change] | None = None,
        roles: Mapping[str, Sequence[str]] | None = None,
        prefixes: Mapping[str, Sequence[str]] | None = None,
        pythons: Mapping[str, Path] | None = None,
    ) -> None:
        """Write the configuration of every part.

        Args:
            turn: "coturn" or "embedded".
            gateways: 1 or 2, in network b.
            late_s: delay of each connection from a gateway to the TURN server, and so of each bind.
            coturn_options: further options of coturn; one with a value needs the `=`.
            changes: modifications of the configuration, by part.
            roles: the roles of the configuration to run, by part; by default all.
            prefixes: commands to run a part with, by part. They must exec, so that the pid is the part's.
            pythons: interpreters of environments with another version of crossnet, by part.
        """
        self.folder, self.ground, self.plan = folder, ground, ground.plan
        self.turn = turn
        self._late_s = late_s
        self._coturn_options = list(coturn_options)
        self._roles = dict(roles or {})
        self._prefixes = dict(prefixes or {})
        self._pythons = dict(pythons or {})
        self._parts = Parts(folder, self.plan, Authority(folder), coturn=turn == "coturn")
        self._started: dict[str, list[Part]] = {}
        self._clients: list[SocketStream] = []
        self.names = ["discovery", "turn", "relay", "gateway", *(["gateway-2"] if gateways == 2 else [])]
        if dns:
            self.names.append("dns")
        self._admin = {part: self.plan.admin(part) for part in self.names if part in self.plan.admin_ports}
        self._admin["gateway-2"] = ground.second_gateway, SECOND_ADMIN_PORT
        if turn == "coturn":
            del self._admin["turn"]
        changes = dict(changes or {})
        self._change("gateway", _any_port_of_its_services, changes.pop("gateway", _nothing))
        if gateways == 2:
            second = yaml.safe_load(self._parts.path("gateway").read_text())
            second["gateway"]["id"] = "gw-2"
            second["admin"] = "{}:{}".format(*self._admin["gateway-2"])
            self._parts.path("gateway-2").write_text(yaml.safe_dump(second))
        if late_s:
            self._change("relay" if turn == "coturn" else "turn", self._by_way_of_the_hop)
            self._change("relay", self._not_by_way_of_the_hop)
        for part, change in changes.items():
            self._change(part, change)

    def _change(self, part: str, *changes: Change) -> None:
        path = self._parts.path(part)
        document = yaml.safe_load(path.read_text())
        for change in changes:
            change(document)
        path.write_text(yaml.safe_dump(document))

    def _by_way_of_the_hop(self, document: dict[str, Any]) -> None:
        url = "turn:{}:{}?transport=tcp".format(*self._hop)
        if self.turn == "coturn":
            document["turn_servers"][0]["url"] = url
        else:
            document["turn"]["advertise"] = url

    def _not_by_way_of_the_hop(self, document: dict[str, Any]) -> None:
        # Through the server's URL, the relay would learn the hop's address instead of the one that it dials from.
        source = self.plan.relay if self.plan.router else "127.0.0.1"
        document["relay"]["sources"] = {"turn-1": [source]}

    @property
    def turn_secret(self) -> str:
        """The shared secret from which credentials for the TURN server are made."""
        return self._parts.turn_password

    @property
    def _hop(self) -> tuple[str, int]:
        return self.ground.hop, self.plan.turn_port + 10

    # Starting and stopping

    def start_all(self) -> None:
        """Start all parts, and wait until a first stream can get through."""
        first = ["discovery", "turn", *(["hop"] if self._late_s else [])]
        for part in first:
            self.start(part)
        for part in first:
            self.until(part, "ready", lambda part=part: self.ready(part))  # type: ignore[misc]
        # The others need these immediately: if they found them missing, they would pause before they try again.
        for part in self.names:
            if part not in first:
                self.start(part)
        for part in self.names:
            self.until(part, "ready", lambda part=part: self.ready(part))  # type: ignore[misc]
        self.until("relay", "every allocation, with permission for it", self.converged)

    def kill_all(self) -> None:
        """Kill all processes."""
        parts = [part for started in self._started.values() for part in started]
        for part in parts:
            with contextlib.suppress(AssertionError):
                part.send_signal(signal.SIGCONT)
            part.kill()

    def start(self, name: str) -> Part:
        """Start a part that does not run. Each start has a log of its own; old logs are kept."""
        assert not self._started.get(name) or not self[name].alive, f"{name} is running"
        return self._another(name)

    def upgrade(self, name: str) -> tuple[Part, Part]:
        """Start a second process of a running part. Returns the old and the new process; the name now means the new one."""
        return self[name], self._another(name)

    def _another(self, name: str) -> Part:
        started = self._started.setdefault(name, [])
        part = Part(name if not started else f"{name}.{len(started)}", self._command(name), self.folder)
        started.append(part)
        with self.ground.on(name):
            part.start()
        return part

    def _command(self, name: str) -> list[str]:
        if name == "turn" and self.turn == "coturn":
            return [*self._parts.coturn_command(), *self._coturn_options]
        if name == "hop":
            to = self.plan.turn, self.plan.turn_port
            return [sys.executable, str(Path(__file__).with_name("hop.py")), *map(str, (*self._hop, *to, self._late_s))]
        python, *arguments = self._parts.command(name)
        return [
            *self._prefixes.get(name, ()),
            str(self._pythons.get(name, python)),
            *arguments,
            *self._roles.get(name, ()),
        ]

    def __getitem__(self, name: str) -> Part:
        """The latest process of a part."""
        return self._started[name][-1]

    # Observing

    def ask(self, part: str, path: str) -> Any:
        """Get a JSON document from a part's admin server; None if it does not answer."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            with self.ground.on(part):
                connection = http.client.HTTPConnection(*self._admin[part], timeout=ASK_TIMEOUT_S)
                connection.connect()
            with contextlib.closing(connection):
                connection.request("GET", path)
                return json.loads(connection.getresponse().read())
        return None

    def ready(self, part: str) -> bool:
        """Whether a part is ready; for coturn and hop, whether they listen."""
        if part in self._admin:
            return bool((self.ask(part, "/readyz") or {}).get("ready"))
        at = self._hop if part == "hop" else (self.plan.turn, self.plan.turn_port)
        with contextlib.suppress(OSError), self.ground.on(part):
            socket.create_connection(at, ASK_TIMEOUT_S).close()
            return True
        return False

    def registrations(self, gateway: str = "gateway") -> list[dict[str, Any]]:
        """Return a gateway's published registrations: one for each allocation that relays may use."""
        lines = (self.ask(gateway, "/status") or {}).get("registrations", ())
        return [line for line in lines if line.get("published")]

    def records(self, part: str, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind in a part's view of discovery."""
        return [record for record in (self.ask(part, "/mesh") or {}).get("records", ()) if record["kind"] == kind]

    def records_command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `crossnet records` as network b's operator."""
        command = [sys.executable, "-m", "crossnet", "records", "-c", str(self._parts.path("operator")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    def records_at_the_server(self) -> list[dict[str, Any]]:
        """Return all records of the discovery server; an empty list if it does not answer."""
        return [json.loads(line) for line in self.records_command("list", "--json").stdout.splitlines()]

    def delete_store(self) -> None:
        """Delete the store of the discovery server, which must not run."""
        for path in self.folder.glob("discovery.db*"):
            path.unlink()

    def converged(self) -> bool:
        """Whether every running gateway is registered and has permitted the relay, and the relay has its current records."""
        known = {record["id"]: record["spec"]["port"] for record in self.records("relay", "allocation")}
        for gateway in ("gateway", "gateway-2"):
            if gateway in self.names and self[gateway].alive:
                lines = self.registrations(gateway)
                if not lines or not all(
                    line.get("permissions") and known.get(line["record"]) == line["relayed"][1] for line in lines
                ):
                    return False
        return True

    def events(self, part: str, name: str = "stream") -> list[dict[str, Any]]:
        """Return the log events of this name from all processes of a part."""
        found = []
        for line in self.lines(part):
            with contextlib.suppress(ValueError):  # the last line is not complete yet
                event = json.loads(line)
                if event.get("event") == name:
                    found.append(event)
        return found

    def lines(self, part: str) -> list[str]:
        """Return the log lines of all processes of a part."""
        return [line for process in self._started[part] for line in process.lines()]

    def defects(self) -> list[str]:
        """Return the log lines of all parts that indicate a bug."""
        words = ("Traceback", "unexpected error", '"event":"died"', "never retrieved", "was never awaited")
        return [
            f"{part}: {line[:2000]}"
            for part in self._started
            for line in self.lines(part)
            if any(word in line for word in words)
        ]

    def until(self, part: str, what: str, holds: Callable[[], bool]) -> None:
        """Block until a condition holds. Raises AssertionError if the part ends before that."""

        def holds_while_alive() -> bool:
            held = holds()
            assert held or self[part].alive, f"{part} has ended:\n{self[part].tail()}"
            return held

        wait_until(holds_while_alive, what=f"{part}: {what}", details=lambda: self[part].tail())

    async def eventually(
        self, what: str, holds: Callable[[], Awaitable[object] | object], limit_s: float = LIMIT_S
    ) -> None:
        """Wait in the event loop until a condition holds. The error has the last lines of every part's log."""

        def logs() -> str:
            return "\n".join(f"  {part}: {line[:300]}" for part in self._started for line in self.lines(part)[-3:])

        await eventually(holds, limit_s, what=what, details=logs)

    # Streams

    def name(self, port: int) -> str:
        """Return the name by which clients reach this port of the services' host."""
        return f"p{port}-{self.plan.service.replace('.', '-')}.b.{DOMAIN}"

    @asynccontextmanager
    async def serving(self, handle: Callable[[SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
        """Run a service in network b while the block runs. Yields its port.

        An error in it is raised at the end of the block. Clients that are still connected then are closed.
        """
        with self.ground.on("service"):
            listener = Listener(socket.create_server((self.plan.service, 0), backlog=1024))
        failures: list[BaseException] = []

        async def watched(stream: SocketStream) -> None:
            try:
                await handle(stream)
            except BaseException as error:
                failures.append(error)
                raise
            finally:
                stream.close()

        async with asyncio.TaskGroup() as group:
            task = group.create_task(listener.serve(watched))
            try:
                yield listener.address[1]
            finally:
                task.cancel()
                for client in self._clients:
                    client.close()
                self._clients.clear()
        for error in failures:
            if not isinstance(error, asyncio.CancelledError):
                raise error

    async def connect(self) -> SocketStream:
        """Connect to the relay as a client does."""
        with self.ground.on("client"):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        client = await connect_wire(self.plan.relay, self.plan.relay_port, timeout_s=LIMIT_S, sock=sock)
        self._clients.append(client)
        return client

    async def dial(self, name: str, *, hello: bytes | None = None, behind: bytes = b"") -> SocketStream:
        """Connect and send a ClientHello for `name`, with `behind` in the same write."""
        client = await self.connect()
        await client.send((hello or client_hello(name)) + behind)
        return client


@contextmanager
def running_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Run a mesh while the block runs. Fails at the end if a log line indicates a bug."""
    try:
        mesh.start_all()
        yield mesh
        defects = mesh.defects()
        assert not defects, "\n".join(defects)
    finally:
        mesh.kill_all()


def _any_port_of_its_services(document: dict[str, Any]) -> None:
    document["gateway"]["allow"] = [str(target).rpartition(":")[0] for target in document["gateway"]["allow"]]


def _nothing(document: dict[str, Any]) -> None:
    del document


def streams_of(events: Iterable[dict[str, Any]], field: str = "reason") -> list[Any]:
    """Return one field of each event."""
    return [event[field] for event in events]
