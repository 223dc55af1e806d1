"""DNS over HTTPS to one upstream (RFC 8484): a POST for each question, over connections that are kept."""

import logging
import ssl
from collections.abc import Callable

import aiohttp
from yarl import URL

from dnsgw.destination import Destination
from dnsgw.exchange import Pending
from dnsgw.wire import HEADER_SIZE

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # HTTP/1.1: each carries one question at a time
TIMEOUT_S = 1.8  # an exchange's whole time
_MAX_ANSWER = 65535
_TYPE = "application/dns-message"


class HttpsClient:
    """One upstream and its connections, made when first asked."""

    def __init__(
        self,
        destination: Destination,
        tls: ssl.SSLContext,
        *,
        received: Callable[[bytes, Pending], None],
        lost: Callable[[Pending], None],
    ) -> None:
        """Prepare, on the running loop; `received` gets each answer with its id, `lost` what will have none."""
        self._url = URL.build(
            scheme="https", host=str(destination.address), port=destination.port, path=destination.path
        )
        self._name = destination.name
        self._headers = {"Content-Type": _TYPE, "Accept": _TYPE}
        if self._name:
            self._headers["Host"] = self._name
        self._received = received
        self._lost = lost
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, ssl=tls),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def post(self, pending: Pending, ident: int, message: bytes) -> None:
        """Ask what waits alone in `pending`, and hand on the answer.

        The id on the wire is 0, as caches like it (RFC 8484 section 4.1).
        """
        answer = b""
        try:
            async with self._session.post(
                self._url,
                data=b"\0\0" + message,
                headers=self._headers,
                server_hostname=self._name or None,
                allow_redirects=False,
            ) as response:
                if response.status == 200 and response.content_type == _TYPE:
                    answer = await response.content.read(_MAX_ANSWER + 1)
                    while not response.content.at_eof() and len(answer) <= _MAX_ANSWER:
                        answer += await response.content.read(_MAX_ANSWER)
        except (aiohttp.ClientError, TimeoutError, OSError, RuntimeError, ValueError) as error:
            log.debug("dns_upstream_refused", extra={"event": {"error": str(error)[:200]}})
            answer = b""
        if HEADER_SIZE <= len(answer) <= _MAX_ANSWER:
            self._received(ident.to_bytes(2, "big") + answer[2:], pending)
        elif pending:
            self._lost(pending)

    async def close(self) -> None:
        """Drop the connections."""
        await self._session.close()
