"""Moves bytes: one interface for streams, implemented with asyncio and splice(2).

The engine knows sockets, byte counts, deadlines and ends of streams. It knows no names, routes or capsules. A file descriptor that
it owns is never given to an asyncio transport, because uvloop refuses to watch the descriptor of a transport.
"""

from sniproxy.engine.buffer_share import DEFAULT_BUFFER_BYTES
from sniproxy.engine.byte_stream import ByteStream, StreamClosed
from sniproxy.engine.connect import connect
from sniproxy.engine.copy import CopyDirection, End, Lost, Moved, Splice, drain, fill, pump, splice
from sniproxy.engine.deadlines import Deadlines
from sniproxy.engine.idle_timer import IdleTimer
from sniproxy.engine.listener import Listener
from sniproxy.engine.pipes import PipePool
from sniproxy.engine.socket_stream import SocketStream
from sniproxy.engine.tls_stream import TlsStream, connect_tls

__all__ = [
    "DEFAULT_BUFFER_BYTES",
    "ByteStream",
    "CopyDirection",
    "Deadlines",
    "End",
    "IdleTimer",
    "Listener",
    "Lost",
    "Moved",
    "PipePool",
    "SocketStream",
    "Splice",
    "StreamClosed",
    "TlsStream",
    "connect",
    "connect_tls",
    "drain",
    "fill",
    "pump",
    "splice",
]
