"""Clients that arrive at a relay, up to the end of their ClientHello."""

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
"""One read up to the end of the ClientHello: what comes behind it stays in the kernel, which holds the client back, until the
service is there."""


class StreamRefused(Exception):
    """A stream that we end on purpose."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


async def read_endpoints(
    client: ByteStream, record: StreamRecord, proxy_from: Sequence[Network], limit_s: float
) -> tuple[Endpoint, Endpoint]:
    """Say who the client is and where it connected to: by the PROXY header that a load balancer of ours sends first.

    Raises Refusal where one should come and none does; within `limit_s`, as somebody else has said to the wire.
    """
    if not proxy_from:
        return client.peer, client.local
    sender = ip_address(client.peer[0])
    if not any(sender in network for network in proxy_from):
        return client.peer, client.local  # a header from there is not TLS
    data = b""
    found = None
    try:
        while found is None:
            more = await client.recv(HELLO_READ_BYTES)
            if not more:
                raise StreamRefused(Reason.CLIENT_RESET, "closed before its PROXY header was whole")
            data += more
            found = parse_any(data)
    except ProxyError as error:
        raise StreamRefused(Reason.NOT_TLS, f"relay.proxy_from has this address: {error}") from error
    except TimeoutError:
        raise StreamRefused(Reason.HELLO_TIMEOUT, f"no PROXY header in {limit_s} s") from None
    except OSError as error:
        raise StreamRefused(Reason.CLIENT_RESET, "reset before its PROXY header was whole") from error
    header, length = found
    client.unread(data[length:])
    if header.source is None or header.destination is None:
        return client.peer, client.local  # the load balancer itself, asking whether we live
    record.fields |= {
        "client": header.source[0],
        "local": f"{header.destination[0]}:{header.destination[1]}",
        "proxy": client.peer[0],
    }
    return header.source, header.destination


async def read_hello(
    client: ByteStream, record: StreamRecord, share: Share, max_hello_bytes: int, limit_s: float
) -> tuple[Hello, bytes]:
    """Read up to the end of the ClientHello, and what came along with it.

    The wire has its deadline already, as above. Raises Refusal where it is none that a relay can go by.
    """
    reader = HelloReader(max_hello_bytes)
    try:
        while True:
            data = await client.recv(HELLO_READ_BYTES, low=reader.missing)
            if not data:
                if reader.raw:
                    raise StreamRefused(Reason.BAD_HELLO, "the client ended inside its ClientHello")
                raise StreamRefused(Reason.CLIENT_RESET, "the client closed without a byte")
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
        size = len(reader.raw) + len(client.try_recv())  # what is left unread would make the end a reset
        raise StreamRefused(Reason.HELLO_TIMEOUT, f"no whole ClientHello in {limit_s} s, {size} bytes came") from None
    except OSError as error:
        raise StreamRefused(Reason.CLIENT_RESET, "reset before its ClientHello was whole") from error
