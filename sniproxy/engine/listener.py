"""Accepts connections on raw sockets and runs each in its own task."""

import asyncio
import errno
import ipaddress
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

from sniproxy.engine.socket_address import socket_address
from sniproxy.engine.socket_stream import SocketStream, plain_address, tune
from sniproxy.engine.tls_stream import TlsStream

log = logging.getLogger(__name__)

DEFAULT_BACKLOG = 4096
"""The default of net.core.somaxconn on Linux since 5.4. A burst of clients waits in the kernel instead of retrying SYNs."""

ACCEPT_BATCH = 16
"""Connections accepted in a row before other work runs."""

CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Out of descriptors or memory: connections stay in the backlog, and accepting resumes after a pause (as in trio)."""

CAPACITY_PAUSE_S = 0.1
"""How long accepting pauses after such an error."""

CAPACITY_LOG_INTERVAL_S = 1.0
"""Such an error is logged once in this time."""

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
"""Errors of the connection that was about to be accepted (accept(2)). The next one may be fine."""


class Listener:
    """A listening socket. `address` is what it is bound to, with the port that the kernel chose for port 0."""

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLContext | None = None, *, capacity_pause_s: float = CAPACITY_PAUSE_S
    ) -> None:
        """Take ownership of a listening socket.

        Args:
            sock: already listens.
            tls: see `open`.
            capacity_pause_s: seconds without accepting after the process ran out of descriptors or memory.
        """
        sock.setblocking(False)
        tune(sock)  # once, instead of five system calls for each connection
        self.tls = tls
        """For connections accepted from now on; may be replaced at any time."""
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
        """Bind and listen on an IP literal. `::` takes IPv6 only; IPv4 needs its own listener.

        With `tls`, the handler gets each connection as a TlsStream and must begin with its `handshake`, which has a deadline. So
        the handler's own bound on connections includes those whose handshake is not complete.

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
            sock.bind(socket_address(address, port))
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen on {address} port {port}: {error.strerror}") from error
        return cls(sock, tls, capacity_pause_s=capacity_pause_s)

    def fileno(self) -> int:
        """Return the descriptor, to pass it to another process that accepts from the same queue."""
        return self._fd

    async def serve(self, handle: Callable[[SocketStream], Awaitable[None]]) -> None:
        """Accept until `close`, then wait for the open connections to end. Cancelling cancels those too.

        `handle` owns its stream. An exception that it raises is logged and ends only that connection.
        """
        async with asyncio.TaskGroup() as group:

            def take(stream: SocketStream) -> None:
                task = group.create_task(self._run(stream, handle))
                # A task that is cancelled before its first step never reaches its own `finally`.
                task.add_done_callback(partial(_close, stream))

            await self.run(take)

    async def run(self, take: Callable[[SocketStream], None]) -> None:
        """Accept until `close`. `take` owns each connection it gets, and must not block."""
        try:
            while not self._closed.is_set():
                await self._acceptable()
                pause = self._accept_batch(take)
                if pause:
                    self._unwatch()  # level-triggered: waiting connections would keep the loop busy
                    await asyncio.sleep(pause)
        finally:
            self.close()

    async def _acceptable(self) -> None:
        """Wait for a connection. The descriptor stays watched meanwhile, which saves two epoll_ctl calls for each connection."""
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
        """Accept waiting connections; return for how many seconds to pause then."""
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
            except OSError:  # it is already gone
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

    async def _run(self, stream: SocketStream, handle: Callable[[SocketStream], Awaitable[None]]) -> None:
        try:
            await handle(stream)
        except Exception:
            log.exception("unexpected error while serving %s", stream.peer)

    def close(self) -> None:
        """Stop accepting. Open connections go on."""
        if not self._closed.is_set():
            self._closed.set()
            self._unwatch()
            self._sock.close()
            self._accepting.set()


def _close(stream: SocketStream, _: asyncio.Task[None]) -> None:
    stream.close()
