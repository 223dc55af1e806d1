"""Upgrades without losing connections: a new process takes over the listening sockets of the running one, which then drains.

The running process listens on a unix socket (`handover: PATH`). Its successor connects there before it binds anything, and receives
the descriptors of all TCP listeners. It waits for a view of discovery before it accepts, makes allocations of its own, writes them
to the records in place of its predecessor's, and reports that it has started. Only then does the predecessor stop accepting. Its
allocations stay until their streams have ended. Both use the same socket with the same queue in the kernel, so no client is refused
or reset. (With SO_REUSEPORT each process would have its own queue, and connections in the predecessor's would be reset when it
closes.) A successor that fails to start changes nothing.

Each gateway process has its own epoch (sniproxy.tunnel.epoch), so the two gateways never accept at the same time: connections wait
in the queue until the predecessor has stopped.

Messages: the offer is one JSON line `[["relay", "10.0.0.9", 443], …]` with a descriptor for each entry; the answer is `started`.
When the predecessor closes the connection, it has stopped accepting.
"""

import asyncio
import itertools
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

log = logging.getLogger("crossnet")

MAX_OFFER_BYTES = 64 * 1024
MAX_SOCKETS = 250
"""Linux passes at most 253 descriptors at once (SCM_MAX_FD). Ports that a relay opened for services come last; the successor opens
those beyond the limit itself."""

OFFER_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
"""From the offer until the successor has started: a view of discovery and allocations take seconds."""

READY_TIMEOUT_S = 45.0
"""A successor's own limit for that: if it is not ready by then, it exits, and its predecessor continues."""

STOP_TIMEOUT_S = 5.0
"""From `started` until the predecessor has stopped accepting, which it signals by closing the connection."""

MAX_SUCCESSORS = 4
FAILED_PAUSE_S = 0.5
"""Pause after a successor that did not start, so that one that retries at once does not keep us busy."""

READY_LOOK_S = 0.05

_STARTED = b"started\n"
_CREDENTIALS = struct.Struct("iII")

Place: TypeAlias = tuple[str, str, int]
"""Role, address and port, as configured."""


class Inherited:
    """The sockets from a predecessor; empty if there was none. `take` each one, then call `started`, or `close` on failure."""

    def __init__(
        self, connection: socket.socket | None = None, sockets: dict[Place, socket.socket] | None = None
    ) -> None:
        self._connection = connection
        self._sockets = sockets or {}

    @classmethod
    def receive(cls, path: Path) -> "Inherited":
        """Ask the process that listens at `path`, for at most 5 s. Raises OSError if it is not a predecessor."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(OFFER_TIMEOUT_S)
        descriptors: list[int] = []
        try:
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                return cls()
            _check_peer(connection)
            data, descriptors, _, _ = socket.recv_fds(connection, MAX_OFFER_BYTES, MAX_SOCKETS)
            while data and not data.endswith(b"\n") and len(data) < MAX_OFFER_BYTES:
                more = connection.recv(MAX_OFFER_BYTES)
                if not more:
                    break
                data += more
            places = [(str(role), str(address), int(port)) for role, address, port in json.loads(data)]
            if len(places) != len(descriptors):
                raise ValueError(f"{len(places)} places and {len(descriptors)} sockets")
            sockets = {place: socket.socket(fileno=number) for place, number in zip(places, descriptors, strict=True)}
        except (OSError, ValueError, TypeError) as error:
            connection.close()
            for number in descriptors:
                with suppress(OSError):
                    os.close(number)
            raise OSError(f"{path}: the process that listens there hands nothing over: {error}") from error
        return cls(connection, sockets)

    def __bool__(self) -> bool:
        return self._connection is not None

    def take(self, role: str, address: str, port: int) -> socket.socket | None:
        """Return the listening socket for a place, or None. The caller owns it from now on."""
        return self._sockets.pop((role, address, port), None)

    def rest(self, role: str) -> list[socket.socket]:
        """Return the remaining sockets of a role. The caller owns them from now on."""
        places = [place for place in self._sockets if place[0] == role]
        return [self._sockets.pop(place) for place in places]

    async def started(self) -> None:
        """Tell the predecessor to drain, and wait until it has stopped accepting. Remaining sockets are closed."""
        if self._connection is not None:
            with suppress(OSError):  # TimeoutError is one
                self._connection.sendall(_STARTED)
                self._connection.setblocking(False)
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_recv(self._connection, 1)
        self.close()

    def close(self) -> None:
        """Close the remaining sockets. Without `started`, the predecessor continues."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Offer:
    """Offers the sockets of a running process. `open` it, then `run` until a successor has started."""

    def __init__(
        self,
        path: Path,
        sockets: Callable[[], Iterable[tuple[Place, int]]],
        stop_accepting: Callable[[], None],
        offered: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """Offer these sockets.

        Args:
            path: of the unix socket.
            sockets: returns the places and descriptors to hand over.
            stop_accepting: called when a successor has started, before it is told to accept.
            offered: called with True when a successor has received our sockets, and with False when it has not started.
        """
        self._path = path
        self._sockets = sockets
        self._stop_accepting = stop_accepting
        self._offered = offered
        self._talks: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None

    def open(self) -> None:
        """Listen, replacing the socket of a former process. Raises OSError."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.setblocking(False)
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with suppress(FileNotFoundError):
                fresh.unlink()
            listening.bind(str(fresh))
            fresh.chmod(0o600)
            listening.listen(MAX_SUCCESSORS)
            fresh.replace(self._path)
        except OSError as error:
            listening.close()
            raise OSError(error.errno, f"cannot listen on {self._path}: {error.strerror}") from error
        self._listening = listening

    async def run(self) -> None:
        """Serve successors; return when one has started with our sockets."""
        taken = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            accepting = group.create_task(self._accept(group, taken))
            await taken.wait()
            accepting.cancel()
            for task in self._talks:
                task.cancel()

    async def _accept(self, group: asyncio.TaskGroup, taken: asyncio.Event) -> None:
        assert self._listening is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listening)
            except OSError as error:
                log.error("handover_failed", extra={"event": {"detail": str(error)}})
                await asyncio.sleep(FAILED_PAUSE_S)
                continue
            connection.setblocking(False)
            if len(self._talks) >= MAX_SUCCESSORS:
                log.warning(
                    "handover_refused", extra={"event": {"detail": f"{MAX_SUCCESSORS} successors start already"}}
                )
                connection.close()
                await asyncio.sleep(FAILED_PAUSE_S)
                continue
            # Concurrently: a process that connects and does nothing must not block the real successor.
            task = group.create_task(self._talk(connection, taken))
            self._talks.add(task)
            task.add_done_callback(self._talks.discard)
            await asyncio.sleep(0)  # sock_accept does not yield if a connection is already waiting

    async def _talk(self, connection: socket.socket, taken: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        answer = b""
        self._offered(True)
        try:
            with connection:
                _check_peer(connection)
                offered = list(itertools.islice(self._sockets(), MAX_SOCKETS))
                line = json.dumps([place for place, _ in offered]).encode() + b"\n"
                socket.send_fds(connection, [line], [number for _, number in offered])
                log.info("handover_offered", extra={"event": {"sockets": [place for place, _ in offered]}})
                async with asyncio.timeout(START_TIMEOUT_S):
                    answer = await loop.sock_recv(connection, len(_STARTED))
                if answer == _STARTED and not taken.is_set():
                    self._stop_accepting()
        except (OSError, TimeoutError) as error:
            answer = str(error).encode()
        if answer == _STARTED and not taken.is_set():
            log.info("handed_over", extra={"event": {"detail": "another process accepts from now on"}})
            taken.set()
            return
        log.warning(
            "handover_failed", extra={"event": {"detail": "the successor did not start: this process continues"}}
        )
        if len(self._talks) <= 1:
            self._offered(False)
        await asyncio.sleep(FAILED_PAUSE_S)

    def close(self) -> None:
        """Stop offering."""
        if self._listening is not None:
            self._listening.close()


def _check_peer(connection: socket.socket) -> None:
    """Raise OSError unless the peer's user is our own or root: nobody else may have our sockets."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user not in (0, os.getuid()):
        raise PermissionError(f"user {user} is neither ours nor root")
