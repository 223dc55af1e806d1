"""Runs the parts of the lab as processes: starts them in order, waits until they are ready, and always ends them."""

import http.client
import json
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossnet.config.sections import DEFAULT_DOMAIN
from crossnet.lab import service
from crossnet.lab.certificates import Authority
from crossnet.lab.parts import ORDERS, Parts
from crossnet.lab.program import Program, ProgramError
from crossnet.lab.topology import Network, Topology
from discovery.model.addresses import parse_address
from discovery.model.names import AddressTarget, Form, encode

ASK_TIMEOUT_S = 2.0
PUT_TIMEOUT_S = 20.0
NETWORK_OF_PART: dict[str, Network] = {"gateway": "b"}


class Stage:
    """The processes of one run. `stand` starts them; `clear` ends them, and may be called at any time."""

    def __init__(self, topology: Topology, folder: Path, *, turn: str, wanted_service: str) -> None:
        self.topology = topology
        self.plan = topology.plan
        self.folder = folder
        self.authority = Authority(folder)
        target = AddressTarget("b", parse_address(self.plan.service), self.plan.service_port)
        self.compact_name = encode(target, DEFAULT_DOMAIN, Form.COMPACT)
        self.address_name = encode(target, DEFAULT_DOMAIN, Form.MANGLED)
        self.client = self.authority.client("client", "a client in network a")
        self.turn = turn
        self.service_kind = service.choose(wanted_service)
        self.parts = Parts(folder, self.plan, self.authority, coturn=turn == "coturn")
        self.programs: dict[str, Program] = {}
        """The processes by name."""

    def stand(self) -> None:
        """Start everything, and wait until a stream can be carried. Raises ProgramError."""
        try:
            self._stand()
        except ProgramError as error:
            raise ProgramError(f"{error}{self._complaints()}") from error

    def _complaints(self) -> str:
        """Return the warnings of all processes: the one that fails is often not the cause."""
        found = []
        for name, program in self.programs.items():
            lines = [line for line in program.lines() if '"level":"warning"' in line or '"level":"error"' in line]
            found += [f"\n    {name}: {line[:400]}" for line in lines[-3:]]
        return "\n  warnings of all parts:" + "".join(found) if found else ""

    def _stand(self) -> None:
        server = self.authority.server(
            "service", "the service in network b", [f"*.b.{DEFAULT_DOMAIN}", self.address_name, ORDERS]
        )
        plan = self.plan
        self._start("discovery", self.parts.command("discovery"))
        self._start(
            "service",
            service.command(
                self.service_kind, plan.service, plan.service_port, server, self.authority.path, self.folder
            ),
            "b",
        )
        if self.turn == "coturn":
            self._start("coturn", self.parts.coturn_command())
        self._wait_ready("discovery")
        for part in self.parts.names:
            if part != "discovery":
                self._start(part, self.parts.command(part), NETWORK_OF_PART.get(part, "a"))
        self._until("service", "a connection", lambda: _answers(plan.service, plan.service_port))
        if self.turn == "coturn":
            self._until("coturn", "a connection", lambda: _answers(plan.turn, plan.turn_port))
        self._tell_of_service()
        for part in self.parts.names:
            self._wait_ready(part)
        self._until("gateway", "permission for the relay on the TURN server", self._permitted)
        self._until("relay", "the allocation and the service in discovery", lambda: self._knows("relay", "allocation"))
        self._until("dns", "the relay and the service in discovery", lambda: self._knows("dns", "relay"))

    def clear(self) -> None:
        """Terminate all processes at once, and wait until they have ended."""
        for program in reversed(self.programs.values()):
            program.ask_to_end()
        for program in reversed(self.programs.values()):
            program.end()

    def hold(self, network: Network) -> int:
        """Start an idle process in a network, through which the network can be entered; return its pid when it is inside."""
        holder = self._start(f"holder-{network}", ["sh", "-c", "echo there; exec sleep infinity"], network)
        # Before that, somebody who enters through it would get the host's resolver, not the network's.
        holder.wait_until("inside the network", lambda: holder.lines() == ["there"])
        return holder.pid

    def ask(self, part: str, path: str) -> Any:
        """Request a page of a part's admin server; None if it does not answer."""
        connection = http.client.HTTPConnection(*self.plan.admin(part), timeout=ASK_TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()

    def streams(self, part: str) -> list[dict[str, Any]]:
        """Return the events of ended streams that a part has logged."""
        events = []
        for line in self.programs[part].lines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("event") == "stream":
                events.append(event)
        return events

    def registration(self) -> dict[str, Any]:
        """Return the state of the gateway's registration with network a's TURN server."""
        status = self.ask("gateway", "/status") or {}
        return next(iter(status.get("registrations", ())), {})

    def _start(self, name: str, command: Sequence[str], network: Network = "a") -> Program:
        program = self.programs[name] = Program(name, self.topology.command(network, command), self.folder)
        program.start()
        return program

    def _until(self, name: str, what: str, ready: Callable[[], bool]) -> None:
        self.programs[name].wait_until(what, ready)

    def start_part(self, part: str) -> None:
        """Start a crossnet part whose configuration file exists, for the first time or again, and wait until it is ready."""
        self._start(part, self.parts.command(part), NETWORK_OF_PART.get(part, "a"))
        self._wait_ready(part)

    def _wait_ready(self, part: str) -> None:
        self._until(part, "ready", lambda: bool((self.ask(part, "/readyz") or {}).get("ready")))

    def _permitted(self) -> bool:
        return bool(self.registration().get("permissions"))

    def _knows(self, part: str, kind: str) -> bool:
        records = (self.ask(part, "/mesh") or {}).get("records", ())
        return {kind, "service"} <= {record["kind"] for record in records}

    def _tell_of_service(self) -> None:
        command = self.topology.command("b", self.parts.service_command())
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PUT_TIMEOUT_S, cwd=self.folder, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"crossnet records put: no end within {PUT_TIMEOUT_S:g} s") from error
        if done.returncode:
            raise ProgramError(f"crossnet records put: {done.stderr.strip()}")


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), ASK_TIMEOUT_S):
            return True
    except OSError:
        return False
