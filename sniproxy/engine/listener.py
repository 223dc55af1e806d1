"""Accept connections on raw sockets and run each in a task of its own."""

import asyncio
import errno
import ipaddress
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

from sniproxy.engine.socket_stream import SocketStream, plain_address, tune
from sniproxy.engine.tls_stream import TlsStream

log = logging.getLogger(__name__)

DEFAULT_BACKLOG = 4096
"""What net.core.somaxconn allows by default on Linux since 5.4; a burst of clients waits in the kernel, not in SYN retries."""

ACCEPT_BATCH = 16
"""Connections taken at once before others get a turn."""

CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Out of descriptors or memory: connections stay in the backlog, and accepting resumes after a pause (as in trio)."""

CAPACITY_PAUSE_S = 0.1
"""How long accepting pauses after such an error."""

CAPACITY_LOG_INTERVAL_S = 1.0

TRANSIENT_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
        errno.ETIMEDOUT,
    }
)
"""Errors of the one connection that was about to be accepted (accept(2)); the next may be well."""


class Listener:
    """A listening socket. `address` is what it is bound to, with the port that was chosen where 0 was asked."""

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLContext | None = None, *, capacity_pause_s: float = CAPACITY_PAUSE_S
    ) -> None:
        sock.setblocking(False)
        tune(sock)  # once, not five calls for each connection
        self.tls = tls
        """For the connections accepted from now on; another context may be set at any time."""
        self._sock = sock
        self._capacity_pause_s = capacity_pause_s
        self._loop = asyncio.get_running_loop()
        self._fd = sock.fileno()
        self._accepting = asyncio.Event()
        self._closed = asyncio.Event()
        self._watched = False
        self._capacity_logged = -CAPACITY_LOG_INTERVAL_S
        name = sock.getsockname()
        self.address: tuple[str, int] = (plain_address(name[0]), name[1])

    @classmethod
    async def open(
        cls,
        address: str,
        port: int,
        *,
        backlog: int = DEFAULT_BACKLOG,
        reuse_port: bool = False,
        tls: ssl.SSLContext | None = None,
        capacity_pause_s: float = CAPACITY_PAUSE_S,
    ) -> "Listener":
        """Bind and listen on an IP literal. `::` takes IPv6 only: IPv4 has its own listener.

        With `tls` the handler gets each connection as a TlsStream and begins with its `handshake`, which has a deadline: so
        the handler's own bound on connections counts those that have not shaken hands, too.

        Raises:
            OSError: the address is not ours, or the port is taken; the message names both.
        """
        family = socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen on {address} port {port}: {error.strerror}") from error
        return cls(sock, tls, capacity_pause_s=capacity_pause_s)

    def fileno(self) -> int:
        """The descriptor, to be given to another process that accepts from the same queue."""
        return self._fd

    async def serve(self, handle: Callable[[SocketStream], Awaitable[None]]) -> None:
        """Accept until `close`, then wait for the connections that are open. Cancelling cancels those too.

        `handle` owns its stream; an exception out of it is logged and ends that connection alone.
        """
        async with asyncio.TaskGroup() as group:

            def take(stream: SocketStream) -> None:
                task = group.create_task(self._run(stream, handle))
                # A task that is cancelled before its first step never reaches its own finally.
                task.add_done_callback(partial(_close, stream))

            await self.run(take)

    async def run(self, take: Callable[[SocketStream], None]) -> None:
        """Accept until `close`. `take` owns each connection from then on, and must not block."""
        try:
            while not self._closed.is_set():
                await self._acceptable()
                pause = self._accept_batch(take)
                if pause:
                    self._unwatch()  # level-triggered: what waits would keep the loop busy
                    await asyncio.sleep(pause)
        finally:
            self.close()

    async def _acceptable(self) -> None:
        """Wait for a connection. The descriptor stays watched in between: two calls of epoll_ctl a connection less."""
        self._accepting.clear()
        if not self._watched:
            self._loop.add_reader(self._fd, self._accepting.set)
            self._watched = True
        await self._accepting.wait()

    def _unwatch(self) -> None:
        if self._watched:
            self._loop.remove_reader(self._fd)
            self._watched = False

    def _accept_batch(self, take: Callable[[SocketStream], None]) -> float:
        """Take what waits; returns for how many seconds to pause."""
        for _ in range(ACCEPT_BATCH):
            if self._closed.is_set():
                break
            try:
                sock, peer = self._sock.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    self._log_capacity(error)
                    return self._capacity_pause_s
                if error.errno in TRANSIENT_ERRNOS:
                    continue
                raise
            try:
                stream = SocketStream(sock, peer) if self.tls is None else TlsStream(sock, self.tls, server_side=True)
            except OSError:  # gone before we could set an option
                sock.close()
                continue
            take(stream)
        return 0.0

    def _log_capacity(self, error: OSError) -> None:
        now = self._loop.time()
        if now - self._capacity_logged >= CAPACITY_LOG_INTERVAL_S:
            self._capacity_logged = now
            log.error(
                "accept: %s on %s port %s: connections wait; raise the limit of open files",
                error.strerror,
                *self.address,
            )

    async def _run(self, wire: SocketStream, handle: Callable[[SocketStream], Awaitable[None]]) -> None:
        try:
            await handle(wire)
        except Exception:
            log.exception("unexpected error while serving %s", wire.peer)

    def close(self) -> None:
        """Stop accepting; connections that are open go on."""
        if not self._closed.is_set():
            self._closed.set()
            self._unwatch()
            self._sock.close()
            self._accepting.set()


def _close(wire: SocketStream, _: asyncio.Task[None]) -> None:
    wire.close()
