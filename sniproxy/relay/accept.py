"""Reads the start of a client's connection: an optional PROXY header, and the ClientHello."""

from collections.abc import Sequence
from ipaddress import ip_address

from discovery.model.addresses import Network
from sniproxy.access.client_limits import Share
from sniproxy.engine import ByteStream
from sniproxy.formats.client_hello import Hello, HelloError, HelloReader
from sniproxy.formats.other_protocols import silent
from sniproxy.formats.proxy_protocol import Endpoint, ProxyError, parse_any
from sniproxy.streams.end_reason import Reason
from sniproxy.streams.stream_log import StreamRecord

HELLO_READ_BYTES = 16 * 1024
"""Size of one read up to the end of the ClientHello. Later data stays in the kernel, which slows the client down, until the service
is connected."""


class StreamRefused(Exception):
    """A stream that is refused, with the reason for log, metrics and alert. `is_gone`: nobody is there to read an alert."""

    def __init__(self, reason: Reason, detail: str, *, is_gone: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.is_gone = is_gone


def _left(received: int, missing: str, error: OSError | None = None) -> StreamRefused:
    """Return the refusal of a client that has closed, or reset with this error, before it had sent what is missing."""
    how = "closed" if error is None else "reset"
    if not received:
        return StreamRefused(Reason.PROBE, f"{how} without a byte", is_gone=True)
    return StreamRefused(Reason.CLIENT_RESET, f"{how} before its {missing} was complete", is_gone=True)


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
                raise _left(len(data), "PROXY header")
            data += more
            found = parse_any(data)
    except ProxyError as error:
        raise StreamRefused(Reason.NOT_TLS, f"relay.proxy_from has this address: {error}") from error
    except TimeoutError:
        raise StreamRefused(Reason.HELLO_TIMEOUT, f"no PROXY header in {limit_s} s") from None
    except OSError as error:
        raise _left(len(data), "PROXY header", error) from error
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
    client: ByteStream, record: StreamRecord, share: Share, max_hello_bytes: int, limit_s: float, local_port: int
) -> tuple[Hello, bytes]:
    """Read the ClientHello; return it, and all bytes that were read with it.

    Raises StreamRefused if it cannot be routed. The caller has given the stream its deadline; `limit_s` and `local_port`, to which
    the client connected, are for the error text.
    """
    reader = HelloReader(max_hello_bytes)
    try:
        while True:
            data = await client.recv(HELLO_READ_BYTES, low=reader.missing)
            if not data:
                if reader.raw:
                    raise StreamRefused(Reason.BAD_HELLO, "the client ended in the middle of its ClientHello")
                raise _left(0, "ClientHello")
            if not share.take(len(data)):
                raise StreamRefused(Reason.OVERLOADED, "too many unfinished ClientHellos: relay.max_hello_held")
            hello = reader.feed(data)
            if hello is not None:
                if hello.ech:
                    record.fields["ech"] = True
                return hello, reader.raw
    except HelloError as error:
        reason = Reason.PROBE if error.is_probe else Reason(error.reason.value)
        raise StreamRefused(reason, error.detail) from error
    except TimeoutError:
        size = len(reader.raw) + len(client.try_recv())  # closing with unread bytes would be a reset
        if not size:
            raise StreamRefused(Reason.NOT_TLS, f"nothing came in {limit_s:g} s, as in {silent(local_port)}") from None
        raise StreamRefused(
            Reason.HELLO_TIMEOUT, f"no complete ClientHello in {limit_s} s, {size} bytes came"
        ) from None
    except OSError as error:
        raise _left(len(reader.raw), "ClientHello", error) from error
