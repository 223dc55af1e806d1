"""Says when an address, a link, a route or a routing rule of this host changes, as the kernel tells it by rtnetlink.

A connected socket keeps the source address and the route that it was connected with, even if the host no longer has them. Whoever
keeps sockets should look at them when something changes: `source_towards` says which address the kernel would choose now.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from sniproxy.engine.socket_address import socket_address

log = logging.getLogger(__name__)

SETTLE_S = 0.05
"""From the first message to the call: changes come in groups, such as an address and its routes. Hosts that learn many routes by
BGP cause one call in this time, however many routes change."""

# linux/rtnetlink.h: RTMGRP_LINK, and addresses, routes and rules of IPv4 and IPv6 (rules of IPv6 have no bit of this kind).
_GROUPS = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400
_MESSAGES_BYTES = 65536
_MAX_DRAIN = 64


class NetworkChanges:
    """Calls back some time after each change."""

    def __init__(self, changed: Callable[[], None], *, settle_s: float = SETTLE_S) -> None:
        """Runs on the running loop, from now on. Where the kernel does not tell, as in some sandboxes, nothing is called."""
        self._changed = changed
        self._settle_s = settle_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sock: socket.socket | None = None
        try:
            sock = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )
        except OSError as error:
            log.info("network_changes_unknown", extra={"event": {"error": str(error)}})
            return
        try:
            sock.bind((0, _GROUPS))
            self._loop.add_reader(sock, self._readable)
        except OSError as error:
            sock.close()
            log.info("network_changes_unknown", extra={"event": {"error": str(error)}})
            return
        self._sock = sock

    def close(self) -> None:
        """Stop; `changed` is not called any more."""
        sock, self._sock = self._sock, None
        if self._timer is not None:
            self._timer.cancel()
        if sock is not None:
            self._loop.remove_reader(sock)
            sock.close()

    def _readable(self) -> None:
        """Wait until the change is complete. The kernel drops messages that do not fit into its queue, and they are not missed."""
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._timer = self._loop.call_later(self._settle_s, self._settled, self._sock)

    def _settled(self, sock: socket.socket) -> None:
        self._timer = None
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MAX_DRAIN):
                with contextlib.suppress(InterruptedError):
                    self._discard(sock)
        self._loop.add_reader(sock, self._readable)
        try:
            self._changed()
        except Exception:  # as in other callbacks: the next change is to be heard
            log.exception("network_changes_failed")

    @staticmethod
    def _discard(sock: socket.socket) -> None:
        """Read messages; what they say is not needed. Raises BlockingIOError when there are no more."""
        try:
            sock.recv(_MESSAGES_BYTES)
        except (BlockingIOError, InterruptedError):
            raise
        except OSError:
            pass  # ENOBUFS: the kernel had to drop some


def source_towards(address: str, port: int = 9) -> str | None:
    """Return the local address that the kernel would choose for an IP literal, without a zone; None: it cannot be reached.

    Nothing is sent.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(socket_address(address, port))
        except OSError:
            return None
        return str(probe.getsockname()[0]).partition("%")[0]
