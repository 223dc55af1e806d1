"""A mesh of real processes: discovery, a TURN server, relay and gateways, each a `crossnet run` (or Debian's coturn).

    with standing(Mesh(folder, Loopback(), turn="coturn")) as mesh:
        name = mesh.name(await mesh.serve(handle, closing))
        client = await mesh.dial(name)

The configuration is the lab's own (`crossnet.lab.parts`), with what a test changes. Where the parts stand is the ground's
business: addresses of the loopback interface, or hosts of their own (`tests.support.hosts`). Clients and services are the
test's: sockets in its own loop, made on their hosts. Every process is ended by its pid, and by the kernel should the test
run be killed.
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
"""The TURN servers, of which each must hold what the other does."""

DOMAIN = "svc.mesh.internal"
ASK_TIMEOUT_S = 2.0
END_TIMEOUT_S = 20.0

SECOND_ADMIN_PORT = 8795

Change = Callable[[dict[str, Any]], None]
"""Changes a part's configuration before it is written."""


class Ground(Protocol):
    """Where the parts stand."""

    plan: topology.Plan
    second_gateway: str
    hop: str
    """Addresses of gateway-2 and hop; the others are the plan's."""

    def on(self, part: str) -> AbstractContextManager[None]:
        """Be on a part's host while the block runs: sockets and processes that are made in it belong there."""


class Loopback:
    """All on addresses of the loopback interface that nobody else uses."""

    def __init__(self) -> None:
        self.plan = topology.Loopback().plan
        self.second_gateway = self.hop = self.plan.gateway

    def on(self, part: str) -> AbstractContextManager[None]:
        """Stay where we are."""
        del part
        return nullcontext()


class Part(Program):
    """One process, with what only a test does to it."""

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def exit_code(self) -> int:
        """Wait for its end and return the exit code."""
        assert self._process is not None
        return self._process.wait(END_TIMEOUT_S)

    @property
    def alive(self) -> bool:
        """It has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def descriptors(self) -> int:
        """Count its open descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Mesh:
    """The processes of one run. Parts are called discovery, turn, relay, gateway and gateway-2, dns, hop."""

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
            late_s: by how much each connection of a gateway to the TURN server is late, and so each bind.
            coturn_options: more of coturn's; one with a value needs the `=`.
            changes: by part, what is different in its configuration.
            roles: by part, which roles of its configuration to run; all, unless given.
            prefixes: by part, what to run it with; it must exec, so that the pid is the part's.
            pythons: by part, the interpreter of an environment that has another version of crossnet.
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
        # By the server's URL the relay would learn the hop's address in place of the one that it dials from.
        source = self.plan.relay if self.plan.router else "127.0.0.1"
        document["relay"]["sources"] = {"turn-1": [source]}

    @property
    def turn_secret(self) -> str:
        """What makes credentials for the TURN server."""
        return self._parts.turn_password

    @property
    def _hop(self) -> tuple[str, int]:
        return self.ground.hop, self.plan.turn_port + 10

    # Life

    def stand(self) -> None:
        """Start everything and wait until a first stream can go through."""
        first = ["discovery", "turn", *(["hop"] if self._late_s else [])]
        for part in first:
            self.start(part)
        for part in first:
            self.until(part, "ready", lambda part=part: self.ready(part))  # type: ignore[misc]
        # What these need at once is there now: nobody has to try again, and to wait before that.
        for part in self.names:
            if part not in first:
                self.start(part)
        for part in self.names:
            self.until(part, "ready", lambda part=part: self.ready(part))  # type: ignore[misc]
        self.until("relay", "every allocation, with permission for it", self.whole)

    def clear(self) -> None:
        """End every process, all at once."""
        parts = [part for started in self._started.values() for part in started]
        for part in parts:
            with contextlib.suppress(AssertionError):
                part.send_signal(signal.SIGCONT)
            part.kill()

    def start(self, name: str) -> Part:
        """Start a part, or start it again; its log begins anew and the old one stays."""
        assert not self._started.get(name) or not self[name].alive, f"{name} runs"
        return self._another(name)

    def upgrade(self, name: str) -> tuple[Part, Part]:
        """Start a part once more beside itself; gives the old process and the new one, which the part's name means from now on."""
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
        """The process of a part, the latest if it was started again."""
        return self._started[name][-1]

    # What they say

    def ask(self, part: str, path: str) -> Any:
        """Ask a part's admin server; None while it does not answer."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            with self.ground.on(part):
                connection = http.client.HTTPConnection(*self._admin[part], timeout=ASK_TIMEOUT_S)
                connection.connect()
            with contextlib.closing(connection):
                connection.request("GET", path)
                return json.loads(connection.getresponse().read())
        return None

    def ready(self, part: str) -> bool:
        """Whether a part says that it is ready; coturn and hop, that they listen."""
        if part in self._admin:
            return bool((self.ask(part, "/readyz") or {}).get("ready"))
        at = self._hop if part == "hop" else (self.plan.turn, self.plan.turn_port)
        with contextlib.suppress(OSError), self.ground.on(part):
            socket.create_connection(at, ASK_TIMEOUT_S).close()
            return True
        return False

    def registrations(self, gateway: str = "gateway") -> list[dict[str, Any]]:
        """Return how a gateway stands with the TURN server: one line for each allocation that relays may use."""
        lines = (self.ask(gateway, "/status") or {}).get("registrations", ())
        return [line for line in lines if line.get("published")]

    def records(self, part: str, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind that a part knows."""
        return [record for record in (self.ask(part, "/mesh") or {}).get("records", ()) if record["kind"] == kind]

    def records_command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `crossnet records` as network b's operator."""
        command = [sys.executable, "-m", "crossnet", "records", "-c", str(self._parts.path("operator")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    def records_at_the_server(self) -> list[dict[str, Any]]:
        """Return all records that the discovery server has; none while it does not answer."""
        return [json.loads(line) for line in self.records_command("list", "--json").stdout.splitlines()]

    def forget_all(self) -> None:
        """Remove the store of a discovery server that does not run."""
        for path in self.folder.glob("discovery.db*"):
            path.unlink()

    def whole(self) -> bool:
        """Whether every gateway is registered, has let the relay in, and is known to the relay as it is now."""
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
        """Return what a part, however often started, has logged of one event."""
        found = []
        for line in self.lines(part):
            with contextlib.suppress(ValueError):  # half a line so far
                event = json.loads(line)
                if event.get("event") == name:
                    found.append(event)
        return found

    def lines(self, part: str) -> list[str]:
        """Return all that a part has logged."""
        return [line for process in self._started[part] for line in process.lines()]

    def complaints(self) -> list[str]:
        """Return every line of any part that tells of a defect rather than of its circumstances."""
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
        """The name by which clients reach this port of the services' host."""
        return f"p{port}-{self.plan.service.replace('.', '-')}.b.{DOMAIN}"

    @asynccontextmanager
    async def serving(self, handle: Callable[[SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
        """Run a service in network b while the block runs; give its port.

        What goes wrong in it is raised at the block's end. Clients that still are connected then are closed.
        """
        with self.ground.on("service"):
            listener = Listener(socket.create_server((self.plan.service, 0), backlog=1024))
        failures: list[BaseException] = []

        async def watched(wire: SocketStream) -> None:
            try:
                await handle(wire)
            except BaseException as error:
                failures.append(error)
                raise
            finally:
                wire.close()

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
def standing(mesh: Mesh) -> Iterator[Mesh]:
    """Have a mesh stand while the block runs; at its end no part may have told of a defect."""
    try:
        mesh.stand()
        yield mesh
        complaints = mesh.complaints()
        assert not complaints, "\n".join(complaints)
    finally:
        mesh.clear()


def _any_port_of_its_services(document: dict[str, Any]) -> None:
    document["gateway"]["allow"] = [str(target).rpartition(":")[0] for target in document["gateway"]["allow"]]


def _nothing(document: dict[str, Any]) -> None:
    del document


def streams_of(events: Iterable[dict[str, Any]], field: str = "reason") -> list[Any]:
    """Return one field of each stream that ended."""
    return [event[field] for event in events]
