"""An upgrade that loses no connection: a new process takes the listening sockets of the one that runs, which then drains.

The running process listens on a unix socket (`handover: PATH`). A successor connects there before it binds anything, is given the
descriptors of all TCP listeners, waits for a view of discovery before it accepts, gets allocations of its own and writes them into
the records in place of the first one's, and says so; only then does the first one stop accepting. Its allocations stay until their
streams have ended. It is the same socket with the same queue in the kernel all along, so nobody who connects meanwhile is refused
or reset. (SO_REUSEPORT would give each process a queue of its own, and what waits in the first one's is reset when that closes.) A
successor that fails to start changes nothing.

A gateway's epoch is its process's own (sniproxy.tunnel.epoch), so the two gateways never accept at the same time: connections wait
in the queue until the first one has stopped.

Messages: the offer is one JSON line `[["relay", "10.0.0.9", 443], …]` with a descriptor for each; the answer is `started`. When the
first one closes the connection, it has stopped accepting.
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
"""Linux passes 253 descriptors at once (SCM_MAX_FD). Ports that a relay opened for services come last; what is beyond, the
successor opens beside us."""

OFFER_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
"""From the offer to a successor that has started: a view of discovery and allocations come in seconds."""

READY_TIMEOUT_S = 45.0
"""What a successor gives itself for that: one that is not ready then ends, and its predecessor goes on."""

STOP_TIMEOUT_S = 5.0
"""From a successor that has started to a predecessor that has stopped accepting, which says so by closing the connection."""
MAX_SUCCESSORS = 4
FAILED_PAUSE_S = 0.5
"""After a successor that did not start: one that comes again at once must not keep us busy."""

READY_LOOK_S = 0.05

_STARTED = b"started\n"
_CREDENTIALS = struct.Struct("iII")

Place: TypeAlias = tuple[str, str, int]
"""Role, address and port, as the configuration has them."""


class Inherited:
    """The sockets that a predecessor gave us; empty where there was none. `take` each, then `close` with or without `started`."""

    def __init__(
        self, connection: socket.socket | None = None, sockets: dict[Place, socket.socket] | None = None
    ) -> None:
        self._connection = connection
        self._sockets = sockets or {}

    @classmethod
    def receive(cls, path: Path) -> "Inherited":
        """Ask the process that listens at `path`, waiting for 5 s at most. Raises OSError where what answers is no predecessor."""
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
            raise OSError(f"{path}: what listens there hands nothing over: {error}") from error
        return cls(connection, sockets)

    def __bool__(self) -> bool:
        return self._connection is not None

    def take(self, role: str, address: str, port: int) -> socket.socket | None:
        """The listening socket for this place, if there is one; the caller's from now on."""
        return self._sockets.pop((role, address, port), None)

    def rest(self, role: str) -> list[socket.socket]:
        """What has not been taken of a role; the caller's from now on."""
        places = [place for place in self._sockets if place[0] == role]
        return [self._sockets.pop(place) for place in places]

    async def started(self) -> None:
        """Let the predecessor drain, and wait until it accepts nothing more. What was not taken is closed."""
        if self._connection is not None:
            with suppress(OSError):  # TimeoutError is one
                self._connection.sendall(_STARTED)
                self._connection.setblocking(False)
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_recv(self._connection, 1)
        self.close()

    def close(self) -> None:
        """Give up what was not taken; without `started` the predecessor goes on."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Offer:
    """What a running process hands over. `open` it, then `run` until somebody has taken it."""

    def __init__(
        self,
        path: Path,
        sockets: Callable[[], Iterable[tuple[Place, int]]],
        stop_accepting: Callable[[], None],
        offered: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """Offer these sockets.

        Args:
            stop_accepting: called when a successor has started, before it is let know: it accepts from then on.
            offered: told that a successor has our sockets and starts, and that it has not started.
        """
        self._path = path
        self._sockets = sockets
        self._stop_accepting = stop_accepting
        self._offered = offered
        self._talks: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None

    def open(self) -> None:
        """Listen, in place of whoever listened there before. Raises OSError."""
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
        """Return when a successor has started with our sockets."""
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
            # Beside one another: a process that connects and does nothing must not keep the true successor waiting.
            task = group.create_task(self._talk(connection, taken))
            self._talks.add(task)
            task.add_done_callback(self._talks.discard)
            await asyncio.sleep(0)  # a connection that waits already is taken without a turn of the loop

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
        log.warning("handover_failed", extra={"event": {"detail": "the successor did not start: we go on"}})
        if len(self._talks) <= 1:
            self._offered(False)
        await asyncio.sleep(FAILED_PAUSE_S)

    def close(self) -> None:
        """Stop offering."""
        if self._listening is not None:
            self._listening.close()


def _check_peer(connection: socket.socket) -> None:
    """Our sockets are for processes of our own user, and of root, only. Raises OSError."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user not in (0, os.getuid()):
        raise PermissionError(f"user {user} is neither ours nor root")
