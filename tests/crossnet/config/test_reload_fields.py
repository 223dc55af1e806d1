"""Every field of every section changes under running processes: it is applied, or waits for a restart, or is refused."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from crossnet.app import role_configs
from crossnet.app.app import App
from crossnet.app.publication import RelayPublication
from crossnet.app.roles.discovery_server import DiscoveryServerRole
from crossnet.app.roles.dns import DnsRole
from crossnet.app.roles.gateway import GatewayRole
from crossnet.app.roles.relay import RelayRole
from crossnet.app.roles.turn import TurnRole
from crossnet.config.file import load
from crossnet.config.schema import Leaf, encode, fields_of, is_live, unwrapped
from crossnet.config.sections import Config
from discovery.api import DiscoveryServer
from discovery.model.mesh import Kind
from sniproxy.relay.relay import Relay
from tests.crossnet.fields import Document, Field, Files, NoOtherValue, all_fields, value_at
from tests.support.hellos import client_hello
from tests.support.running import Running
from tests.support.waiting import discovery_has, logged, wait_until
from turnreg.gateway.gateway import Gateway
from turnreg.registrar.registrar import Registrar
from turnreg.server.server import TurnServer

LIMIT_S = 20.0
WATCHED_EVERY = 40
"""Of so many fields one is changed by its file alone; SIGHUP is asked for the rest, since it is answered at once."""

SECRETS = ("{file: PATH}", "a file with 64 hexadecimal digits")
_LOGFMT = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')


class Watched(Running):
    """A process whose log is read incrementally, in either format."""

    def __init__(self, folder: Path, document: Document, files: Files) -> None:
        self._files, self._read = files, 0
        self._listening: dict[str, list[str]] | None = None
        super().__init__(folder, files.text(document), name=document["network"])

    def put(self, document: Document, *, ask: bool) -> None:
        """Replace the file atomically."""
        (self.folder / "new").write_text(self._files.text(document))
        os.replace(self.folder / "new", self.log.with_suffix(".yaml"))
        if ask:
            self.process.send_signal(signal.SIGHUP)

    def started(self) -> dict[str, list[str]]:
        """Return where it listens; its log may be in another format later."""
        if self._listening is None:
            self._listening = super().started()
        return self._listening

    def outcome(self) -> dict[str, Any]:
        """Wait for the next event about the configuration file."""
        found: list[dict[str, Any]] = []

        def said() -> bool:
            assert self.process.poll() is None, f"it ended:\n{self.log.read_text()[-4000:]}"
            text = self.log.read_text()
            while not found and (end := text.find("\n", self._read)) >= 0:
                line, self._read = text[self._read : end], end + 1
                event = _event(line)
                if event.get("event") in ("config_read", "config_refused"):
                    found.append(event)
            return bool(found)

        wait_until(said, LIMIT_S)
        return found[0]

    def faults(self) -> list[str]:
        """Return all errors that it has logged so far."""
        events = map(_event, self.log.read_text().splitlines())
        return [str(event["fault"]) for event in events if event.get("event") == "config_fault"]


def _event(line: str) -> dict[str, Any]:
    if line.startswith("{"):
        found: dict[str, Any] = json.loads(line)
        return found
    event: dict[str, Any] = {}
    for name, value in _LOGFMT.findall(line):
        text = json.loads(value) if value.startswith('"') else value
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        event[name] = text
    return event


class Echo:
    """One stream from a client in network a to a service in network b; the test has both ends."""

    def __init__(self, relay: str) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(LIMIT_S)
        self._relay = relay.rpartition(":")
        self.client, self.server = self._dial()
        self._count = 0

    def _dial(self) -> tuple[socket.socket, socket.socket]:
        name = f"p{self._listening.getsockname()[1]}-127-0-0-1.b.svc.mesh.internal"
        hello = client_hello(name)
        deadline = time.monotonic() + LIMIT_S
        self._listening.settimeout(1)
        while True:  # the first attempts may come before the gateway has an allocation
            client = socket.create_connection((self._relay[0], int(self._relay[2])), 10)
            client.sendall(hello)
            with contextlib.suppress(TimeoutError):
                server, _ = self._listening.accept()
                client.settimeout(LIMIT_S)
                server.settimeout(LIMIT_S)
                assert _exactly(server, len(hello)) == hello
                return client, server
            client.close()
            assert time.monotonic() < deadline, "no stream gets through"

    def lives(self) -> None:
        """Check that both directions carry bytes."""
        self._count += 1
        text = f"{self._count:08d}".encode()
        self.client.sendall(text)
        assert _exactly(self.server, len(text)) == text
        self.server.sendall(text)
        assert _exactly(self.client, len(text)) == text

    def close(self) -> None:
        for sock in (self.client, self.server, self._listening):
            sock.close()


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, "the stream has ended"
        data += piece
    return data


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def of_path(said: str, path: str) -> bool:
    """Whether an error concerns this path, or a section that contains it."""
    return path == said or path.startswith((f"{said}.", f"{said}["))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_field_changes_under_running_processes(files: Files) -> None:
    with contextlib.ExitStack() as stack:
        processes = {}
        for part, document in files.documents.items():
            processes[part] = process = Watched(files.folder, document, files)
            stack.callback(process.kill)
            process.started()
        echo = Echo(processes["a"].started()["relay"][0])
        stack.callback(echo.close)
        shown = {part: json.loads(process.ask("/config")[1]) for part, process in processes.items()}
        for number, field in enumerate(all_fields(files.documents)):
            process, document = processes[field.part], files.documents[field.part]
            asked = bool((number + 1) % WATCHED_EVERY)
            # To another good value ...
            process.put(field.changed(document, value_at(shown[field.part], field.place)), ask=asked)
            read = process.outcome()
            assert read["event"] == "config_read", f"{field.path}: {read}, {process.faults()}"
            applied = any(of_path(said, field.path) for said in read["applied"])
            waits = any(of_path(said, field.path) for said in read["restart_needed"])
            assert applied != waits, f"{field.path}: {read}"
            now = json.loads(process.ask("/config")[1])
            if waits or not is_secret(field):
                assert (now == shown[field.part]) == waits, f"{field.path}: {now}"
            echo.lives()
            # ... to a bad one, and back.
            process.put(field.spoilt(document), ask=asked)
            read = process.outcome()
            assert read["event"] == "config_refused", f"{field.path}: {read}"
            assert any(field.path in fault for fault in process.faults()), f"{field.path}: {process.faults()[-3:]}"
            process.put(document, ask=asked)
            read = process.outcome()
            assert read["event"] == "config_read", f"{field.path}: {read}"
            assert read["restart_needed"] == [], f"{field.path}: {read}"
            assert json.loads(process.ask("/config")[1]) == shown[field.part], field.path
            echo.lives()
        for process in processes.values():
            assert "Traceback" not in process.log.read_text()
            assert process.end() == 143


def is_secret(field: Field) -> bool:
    """Whether /config does not show a change of this field."""
    return any(isinstance(mark, Leaf) and mark.expected in SECRETS for mark in unwrapped(field.kind)[1])


def test_a_field_without_another_value_fails() -> None:
    @dataclasses.dataclass
    class Section:
        new: complex

    field = Field(Section, dataclasses.fields(Section)[0], complex, ("new",))
    with pytest.raises(NoOtherValue, match=r"Section\.new: add another good value"):
        field.changed({}, None)


def plain(config: Any) -> dict[str, Any]:
    """Return a role's configuration in a form that can be compared."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return values | {"imports": values["imports"].rules}


class Inside:
    """An application in this process, and the configurations of its roles."""

    def __init__(self, app: App, path: Path, files: Files) -> None:
        self.app, self._path, self._files = app, path, files

    async def take(self, document: Document) -> None:
        """Make it read another file."""
        assert self.app.reloader is not None
        (self._path.parent / "new").write_text(self._files.text(document))
        os.replace(self._path.parent / "new", self._path)
        with logged("crossnet", "config_read", "config_refused") as read:
            self.app.reloader.ask()
            async with asyncio.timeout(LIMIT_S):
                await read.wait()
        assert self.app.reloader.status["faults"] == []

    def holds(self) -> None:
        """Check that every role uses the application's configuration."""
        app, config = self.app, self.app.config
        for role in app.opened:
            match role:
                case RelayRole(relay=relay, publication=publication):
                    self._relay_holds(relay)
                    assert config.relay is not None
                    imported = {network for section in config.imports for network in section.sources}
                    assert publication._asks == sorted(imported | set(config.relay.asks))
                case GatewayRole(gateway=gateway, registrar=registrar):
                    self._gateway_holds(gateway, registrar)
                case TurnRole(server=server):
                    self._turn_holds(server)
                case DnsRole(server=server):
                    assert config.dns is not None
                    assert plain(server.config) == plain(role_configs.dns_config(config, config.dns))
                case DiscoveryServerRole(server=server):
                    self._discovery_server_holds(server)

    def _relay_holds(self, relay: Relay) -> None:
        config = self.app.config
        assert config.relay is not None
        made = role_configs.relay_config(config, config.relay, relay.config.guard)
        assert plain(relay.config) == plain(made)
        assert relay._upstreams.pool.size == made.pool
        assert {transport._config.zone for transport in relay._router.transports} == {made.zone}  # type: ignore[attr-defined]
        for key in role_configs.keys(config).values():
            assert relay._router.keys.get(key.from_network, key.to_network) is not None

    def _gateway_holds(self, gateway: Gateway, registrar: Registrar | None) -> None:
        app, config = self.app, self.app.config
        assert config.gateway is not None
        made = role_configs.gateway_config(config, config.gateway, gateway.config.guard)
        assert gateway.config == made
        assert gateway._service_dialer._allow == made.allow
        assert gateway._service_dialer._policy == made.policy
        assert gateway._handshakes.keys == role_configs.keys(config)
        assert registrar is not None
        epoch = gateway.epoch
        assert registrar.config == role_configs.registrar_config(config, config.gateway, app.guard(), epoch=epoch)
        assert all(one._config is registrar.config for one in registrar._registrations.values())

    def _turn_holds(self, server: TurnServer) -> None:
        config = self.app.config
        assert config.turn is not None
        made = role_configs.turn_config(config, config.turn)
        assert server.config == made
        assert server._state.table.limits == made.limits
        assert server._state.transactions.allowed_peers == made.allowed_peers
        assert server._state.transactions._paces._rate == made.limits.max_bytes_per_second_per_account
        assert server._authenticator._secrets == made.secrets
        assert server._authenticator._keys.keys() == made.users.keys()

    def _discovery_server_holds(self, server: DiscoveryServer) -> None:
        config = self.app.config
        if config.discovery_server is not None:
            made = role_configs.discovery_server_config(config, config.discovery_server)
            assert [part._config for part in (server, server._records, server._leases)] == [made] * 3
            assert server._credentials._config == made
            assert (server._hub.most, server._hub.most_per_network) == (
                made.max_watchers,
                made.max_watchers_per_network,
            )
            assert server._requests.per_s == made.requests_per_s
        assert logging.getLogger().level == getattr(logging, config.log.level.upper())


@asynccontextmanager
async def inside(files: Files, part: str) -> AsyncIterator[Inside]:
    path = files.folder / f"{part}.yaml"
    path.write_text(files.text(files.documents[part]))
    config = load(path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    app = App(config, config.roles, path)
    try:
        async with asyncio.TaskGroup() as group:
            with logged("crossnet", "started") as started:
                group.create_task(app.serve())
                async with asyncio.timeout(LIMIT_S):
                    await started.wait()
            try:
                yield Inside(app, path, files)
            finally:
                app.stop()
                app.stop()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.mark.anyio
@pytest.mark.timeout(120)
async def test_every_role_uses_the_applied_configuration(files: Files) -> None:
    live = {
        part: [field for field in all_fields(files.documents) if field.part == part and applies_at_once(field)]
        for part in files.documents
    }
    assert len(live["a"]) > 50
    for part, those in live.items():
        async with inside(files, part) as one:
            shown = encode(Config, one.app.config)
            for field in those:
                before = one.app.config
                await one.take(field.changed(files.documents[part], value_at(shown, field.place)))
                assert one.app.config != before, field.path
                one.holds()
                await one.take(files.documents[part])
                assert one.app.config == before, field.path
                one.holds()


def applies_at_once(field: Field) -> bool:
    """Whether a field changes without a restart, by itself or with a live field that contains it."""
    kind: Any = Config
    for step in field.place:
        kind = {key: found for key, _, found in fields_of(kind)}[str(step)]
        if is_live(kind):
            return True
        kind = unwrapped(kind)[0]
        if not dataclasses.is_dataclass(kind):
            return False
    return False


class BrokenPublication(RelayPublication):
    """Takes the configuration that it is made with, and fails at any other."""

    def reconfigure(self, config: Config) -> None:
        if hasattr(self, "_asks"):
            raise ZeroDivisionError("a defect")
        super().reconfigure(config)


@pytest.mark.anyio
async def test_an_error_while_it_is_applied_leaves_all_as_it_was(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    async with inside(files, "a") as one:
        app, document = one.app, files.documents["a"]
        assert app.reloader is not None

        def has_turn_server() -> bool:
            return app.discovery.mesh.record(Kind.TURN, "a", "turn-2") is not None

        await discovery_has(app.discovery, has_turn_server)
        before = app.config
        changed = document | {"relay": document["relay"] | {"pool": 7}, "log": {"level": "debug"}, "turn_servers": []}
        changed["turn"] = document["turn"] | {"max_streams_per_user": 5}
        role = app.roles["relay"]
        assert isinstance(role, RelayRole)
        publication = role.publication
        role.publication = BrokenPublication(app.config, app.discovery, [], [])
        (files.folder / "a.yaml").write_text(files.text(changed))
        with logged("crossnet", "config_refused") as refused:
            app.reloader.ask()
            async with asyncio.timeout(LIMIT_S):
                await refused.wait()
        assert app.reloader.status["faults"] == ["an unexpected error: ZeroDivisionError: a defect"]
        assert app.config is before
        role.publication = publication
        one.holds()
        assert has_turn_server()
        # The same file is applied once the error is gone.
        await one.take(changed)
        assert role.relay.config.pool == 7
        one.holds()
        await discovery_has(app.discovery, lambda: not has_turn_server())
    said = capsys.readouterr().err
    assert '"event":"reload_failed"' in said
    assert "ZeroDivisionError" in said
