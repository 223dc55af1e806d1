"""Reads the start of a client's connection: an optional PROXY header, and the ClientHello."""

from collections.abc import Sequence
from ipaddress import ip_address

from discovery.model.addresses import Network
from sniproxy.access.client_limits import Share
from sniproxy.engine import ByteStream
from sniproxy.formats.client_hello import Hello, HelloError, HelloReader
from sniproxy.formats.proxy_protocol import Endpoint, ProxyError, parse_any
from sniproxy.streams.end_reason import Reason
from sniproxy.streams.stream_log import StreamRecord

HELLO_READ_BYTES = 16 * 1024
"""Size of one read up to the end of the ClientHello. Later data stays in the kernel, which slows the client down, until the service
is connected."""


class StreamRefused(Exception):
    """A stream that is refused, with the reason for log, metrics and alert."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


async def read_endpoints(
    client: ByteStream, record: StreamRecord, proxy_from: Sequence[Network], limit_s: float
) -> tuple[Endpoint, Endpoint]:
    """Return the addresses of the client and of what it connected to, from the PROXY header if a load balancer sends one.

    Raises StreamRefused if a PROXY header must come and does not. The caller has given the stream its deadline; `limit_s` is for
    the error text.
    """
    if not proxy_from:
        return client.peer, client.local
    sender = ip_address(client.peer[0])
    if not any(sender in network for network in proxy_from):
        return client.peer, client.local  # a PROXY header from here will be refused as not TLS
    data = b""
    found = None
    try:
        while found is None:
            more = await client.recv(HELLO_READ_BYTES)
            if not more:
                raise StreamRefused(Reason.CLIENT_RESET, "closed before its PROXY header was complete")
            data += more
            found = parse_any(data)
    except ProxyError as error:
        raise StreamRefused(Reason.NOT_TLS, f"relay.proxy_from has this address: {error}") from error
    except TimeoutError:
        raise StreamRefused(Reason.HELLO_TIMEOUT, f"no PROXY header in {limit_s} s") from None
    except OSError as error:
        raise StreamRefused(Reason.CLIENT_RESET, "reset before its PROXY header was complete") from error
    header, length = found
    client.unread(data[length:])
    if header.source is None or header.destination is None:
        return client.peer, client.local  # a health check by the load balancer itself
    record.fields |= {
        "client": header.source[0],
        "local": f"{header.destination[0]}:{header.destination[1]}",
        "proxy": client.peer[0],
    }
    return header.source, header.destination


async def read_hello(
    client: ByteStream, record: StreamRecord, share: Share, max_hello_bytes: int, limit_s: float
) -> tuple[Hello, bytes]:
    """Read the ClientHello; return it, and all bytes that were read with it.

    Raises StreamRefused if it cannot be routed. The caller has given the stream its deadline; `limit_s` is for the error text.
    """
    reader = HelloReader(max_hello_bytes)
    try:
        while True:
            data = await client.recv(HELLO_READ_BYTES, low=reader.missing)
            if not data:
                if reader.raw:
                    raise StreamRefused(Reason.BAD_HELLO, "the client ended in the middle of its ClientHello")
                raise StreamRefused(Reason.CLIENT_RESET, "the client closed without sending a byte")
            if not share.take(len(data)):
                raise StreamRefused(Reason.OVERLOADED, "too many unfinished ClientHellos: relay.max_hello_held")
            hello = reader.feed(data)
            if hello is not None:
                if hello.ech:
                    record.fields["ech"] = True
                return hello, reader.raw
    except HelloError as error:
        raise StreamRefused(Reason(error.reason.value), error.detail) from error
    except TimeoutError:
        size = len(reader.raw) + len(client.try_recv())  # closing with unread bytes would be a reset
        raise StreamRefused(
            Reason.HELLO_TIMEOUT, f"no complete ClientHello in {limit_s} s, {size} bytes came"
        ) from None
    except OSError as error:
        raise StreamRefused(Reason.CLIENT_RESET, "reset before its ClientHello was complete") from error
