"""Runs the roles of one configuration in one process: starts them in order, reloads, drains or hands over, and stops them."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, Info, PlatformCollector, ProcessCollector

from crossnet import logs
from crossnet.admin_server import AdminServer
from crossnet.app import drain, role_configs
from crossnet.app.discovery_client import open_discovery
from crossnet.app.inspection import Inspection
from crossnet.app.local_ports import LocalPortsMetrics
from crossnet.app.readiness import ReadinessMetric
from crossnet.app.role import Role, StartError, beginning
from crossnet.app.roles import ROLES
from crossnet.config.file import warnings
from crossnet.config.reload import Reloader
from crossnet.config.sections import Config
from crossnet.handover import READY_LOOK_S, READY_TIMEOUT_S, Inherited, Offer, Place
from discovery.client.client import DiscoveryClient
from discovery.client.contract import Discovery
from discovery.client.merged import MergedDiscovery
from discovery.model.addresses import format_endpoint, parse_address
from sniproxy.streams.stream_memory import StreamMemoryMetrics

__all__ = ["App", "StartError"]

log = logging.getLogger("crossnet")


class App:
    """The running process. `serve` returns when `stop` has been called and everything is drained."""

    def __init__(
        self,
        config: Config,
        chosen: Sequence[str],
        path: Path | None = None,
        *,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """Create the roles; `serve` starts them.

        Args:
            config: the whole configuration.
            chosen: names of the roles to run.
            path: the configuration file, which is reloaded when it changes; None: it is not.
            ready_timeout_s: how long this process, as a successor, may take until it is ready.
        """
        self.config = config
        self._ready_timeout_s = ready_timeout_s
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(LocalPortsMetrics())
        self.registry.register(StreamMemoryMetrics())
        Info("crossnet_build", "What runs.", registry=self.registry).info({"version": version("crossnet")})
        whole = set(chosen) == set(config.roles)
        self.roles: dict[str, Role] = {
            kind.name: kind(self) for kind in ROLES if kind.name in chosen or (whole and kind.name == "turn_servers")
        }
        self.opened: list[Role] = []
        """The open roles."""
        self.started_at = time.time()
        self.started = False
        self.inherited = Inherited()
        self.handed_over = False
        """Whether a successor has replaced this process."""
        self._discovery: Discovery | None = None
        self._admin_address: tuple[str, int] | None = None
        self._group = asyncio.TaskGroup()
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self.reloader = Reloader(path, config, self._apply, self.registry) if path is not None else None

    # For the roles (crossnet.app.role.Host)

    @property
    def discovery(self) -> Discovery:
        """The client of discovery. Only if `speaks_to_discovery`."""
        assert self._discovery is not None, "opened before discovery"
        return self._discovery

    @property
    def speaks_to_discovery(self) -> bool:
        """Whether there is a client of discovery. A discovery server alone needs none."""
        return self._discovery is not None

    def run(self, name: str, running: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in a task until the process ends. If it raises, the process ends."""
        task = self._tasks[name] = self._group.create_task(running, name=name)
        return task

    def guard(self) -> list[tuple[str, int]]:
        """Return the addresses of this process's listeners so far, and of discovery servers: streams must not go there."""
        bound = [endpoint for _, addresses in self._bound() for endpoint in addresses]
        return bound + role_configs.discovery_endpoints(self.config)

    def has(self, role: str) -> bool:
        """Whether the process runs a role."""
        return role in self.roles

    # For inspection

    @property
    def chosen(self) -> tuple[str, ...]:
        """The active roles."""
        return tuple(name for name, role in self.roles.items() if role.active)

    @property
    def stopping(self) -> bool:
        """Whether it is draining, or has ended."""
        return self._stopping.is_set()

    @property
    def listening(self) -> dict[str, list[str]]:
        """Where each role listens, with the actual ports in place of 0."""
        return {
            name: [format_endpoint(parse_address(address), port) for address, port in addresses]
            for name, addresses in self._bound()
            if addresses
        }

    def _bound(self) -> Iterator[tuple[str, list[tuple[str, int]]]]:
        if self._admin_address is not None:
            yield "admin", [self._admin_address]
        for name, role in self.roles.items():
            yield name, role.addresses

    def stop(self) -> None:
        """Drain and end. The second call ends at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def serve(self) -> None:
        """Start, serve until stopped, drain.

        Raises:
            StartError: a role cannot start.
            ExceptionGroup: a role failed with an unexpected error.
        """
        handover = self.config.handover
        if handover is not None:
            self.inherited = await beginning("handover", asyncio.to_thread(Inherited.receive, handover))
        admin = AdminServer(Inspection(self))
        self.registry.register(ReadinessMetric(self))
        where = str(self.config.admin.address), self.config.admin.port
        try:
            await beginning("admin", admin.open(*where, self.inherited.take("admin", *where)))
            self._admin_address = admin.address
            async with self._group:
                try:
                    self.run("admin", admin.run())
                    await self._start()
                    if handover is not None:
                        self.run("handover", self._offer(handover, admin))
                    if self.reloader is not None:
                        self.run("reloader", self.reloader.run())
                    log.info("started", extra={"event": {"roles": self.chosen, "listening": self.listening}})
                    await self._stopping.wait()
                    plan = drain.hand_over if self.handed_over else drain.end
                    await plan(tuple(self.roles.values()), self.config.drain_s, self._hurry)
                    await self._give_back()
                finally:
                    for task in self._tasks.values():
                        task.cancel()
        finally:
            self.inherited.close()
            await admin.close()
        log.info("ended", extra={"event": {"seconds": time.time() - self.started_at}})

    async def _start(self) -> None:
        roles = list(self.roles.values())
        for role in roles:
            if role.before_discovery:
                await self._open(role)
        if set(self.chosen) - {"discovery_server"}:
            await self._open_discovery()
            for role in roles:
                if not role.before_discovery:
                    await self._open(role)
                if role.name != "discovery_server":
                    role.publish()
        self.started = True
        if self.inherited:
            await self._until("allocations", lambda: all(role.settled for role in roles))
        await self.inherited.started()
        for role in roles:
            role.predecessor_gone()

    async def _open(self, role: Role) -> None:
        await role.open()
        self.opened.append(role)

    async def _open_discovery(self) -> None:
        discovery = self._discovery = await beginning("discovery", open_discovery(self.config, self.registry))
        self.run("discovery", discovery.run())
        if self.inherited:  # clients connect from the first moment, and none must be refused for want of a view
            await self._until("a view of discovery", lambda: discovery.synced)

    async def _until(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait for something that a successor needs before its predecessor may stop. Raises StartError."""
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                while not holds():
                    await asyncio.sleep(READY_LOOK_S)
        except TimeoutError:
            detail = f"without {what} for {self._ready_timeout_s:g} s: the former process continues"
            raise StartError(f"handover: {detail}") from None

    def _apply(self, config: Config) -> None:
        """Apply a configuration that differs only in live settings. If it raises, nothing has changed."""
        old = self.config
        try:
            for part in list(self._changes(old, config)):  # all are created before the first one changes anything
                part()
        except Exception:
            for part in self._changes(config, old):
                try:
                    part()
                except Exception:
                    log.exception(
                        "reload_not_undone", extra={"event": {"detail": "some part may still use the new file"}}
                    )
            raise
        self.config = config
        for warning in warnings(config):
            log.warning("%s", warning)

    def _changes(self, old: Config, new: Config) -> Iterator[Callable[[], None]]:
        """Yield functions that change each part from `old` to `new`; the resolver comes first, since it may refuse."""
        first = self.roles.get("dns")
        if first is not None:
            yield from first.changes(old, new)
        yield partial(
            logs.set_up,
            style=new.log.format,
            level=new.log.level,
            refused_per_s=new.log.refused_per_second,
            probes=new.log.probes,
        )
        if isinstance(self._discovery, DiscoveryClient | MergedDiscovery):
            yield partial(self._discovery.use_token, new.token.text if new.token else None)
        for role in self.roles.values():
            if role is not first:
                yield from role.changes(old, new)

    async def _offer(self, path: Path, admin: AdminServer) -> None:
        """Wait for a successor, then drain. The successor owns the records by then."""

        def sockets() -> Iterator[tuple[Place, int]]:
            yield ("admin", str(self.config.admin.address), self.config.admin.port), admin.fileno()
            for role in self.roles.values():
                yield from role.sockets()

        def stop_listening() -> None:
            for role in self.roles.values():
                role.stop_listening()

        def offered(out: bool) -> None:
            # A successor writes our records as its own, which must not count as a conflict.
            if isinstance(self._discovery, DiscoveryClient | MergedDiscovery):
                self._discovery.expect_successor(out)

        offer = Offer(path, sockets, stop_listening, offered)
        try:
            offer.open()
            await offer.run()
        except OSError as error:
            log.error("handover_failed", extra={"event": {"detail": str(error)}})
            return
        finally:
            offer.close()
        self.handed_over = True
        for role in self.roles.values():
            role.hand_over()
        self._stopping.set()
        await admin.close()

    async def _give_back(self) -> None:
        """Give back allocations and records, so that nobody uses what is gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain.GIVE_BACK_S):
                for role in self.roles.values():
                    await role.give_back()
                if self._discovery is not None:
                    self._tasks["discovery"].cancel()
                    await asyncio.wait([self._tasks["discovery"]])
                    await self._discovery.close()
