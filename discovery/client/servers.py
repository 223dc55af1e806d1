"""The discovery servers of a client: it uses one at a time, and the next one when that fails."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from discovery.files.tls_files import TlsFiles
from discovery.http.errors import certificate_dates, explained, is_out_of_time
from discovery.model.spec import NEGOTIATED
from discovery.pacing.backoff import Backoff

log = logging.getLogger(__name__)

EPOCH_HEADER = "Crossnet-Epoch"
FIELDS_HEADER = "Crossnet-Fields"
CLOCK_PRECISION_S = 2.0
"""Differences up to this count as none: the Date header has whole seconds, and was written a moment ago."""

CLOCKS_APART_S = 10.0
"""A larger difference is logged. It is well below the tolerance of credentials and signatures."""

DATES_AGAIN_S = 600.0
"""How long the dates of a server's certificate are remembered, once it has failed because of a clock."""

REQUEST_TIMEOUT_S = 3.0
"""Below a third of a lease, so that a server that hangs costs one renewal only."""

WATCH_SILENCE_S = 25.0
"""The server sends an empty line every 10 s, so two may be lost."""

BACKOFF = Backoff(0.1, 3.0)
"""A restarted server gives leases their full TTL, 10 s by default, and they have to be renewed within that time."""

MAX_BODY = 1024 * 1024
"""Servers accept bodies up to this size."""

MAX_ANSWER = 64 * 1024 * 1024
"""The list of a hundred thousand records has some 20 MB."""


class ServerUnavailable(Exception):
    """The server cannot be used now. Try another one, or the same one later."""


class RequestRefused(Exception):
    """The server understood a request and refused it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail


def parse_server_url(text: str, *, insecure: bool = False) -> URL:
    """Parse the URL of a discovery server. Raises ValueError. `http` to hosts other than loopback needs `insecure`."""
    expected = "expected https://HOST:PORT, or http:// to loopback"
    try:
        url = URL(text)
        host, port = url.host, url.port
    except ValueError as error:
        raise ValueError(f"{expected}, got {text[:200]!r}: {error}") from None
    bare = url.raw_path in ("", "/") and not url.raw_query_string and not url.raw_fragment and url.user is None
    if url.scheme not in ("http", "https") or not host or not port or not bare or url.password is not None:
        raise ValueError(f"{expected}, got {text[:200]!r}")
    if url.scheme == "http" and not insecure and not _is_loopback(host):
        raise ValueError(f"{expected}; {text[:200]!r} would send the token in clear text (insecure: true permits it)")
    return url.origin()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Servers:
    """The servers of a client, and requests to them."""

    def __init__(
        self,
        urls: Sequence[URL],
        *,
        token: str | None,
        tls: TlsFiles,
        on_epoch: Callable[[str], None],
        on_fields: Callable[[], None] = lambda: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`on_epoch` is called with the store's epoch for every answer, before the answer is used; `on_fields` when `fields` of a
        server has changed.
        """
        self._wall_clock = wall_clock
        self._urls = urls
        self._index = 0
        self._headers: dict[str, str] = {}
        self.use_token(token)
        self._tls = tls
        self._on_epoch = on_epoch
        self._on_fields = on_fields
        self._fields: dict[URL, frozenset[str]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._users = 0
        self.clock_ahead_s: float | None = None
        """Whole seconds by which the clock of the server that answered last is ahead of ours."""
        self._clocks_apart = False
        self._dates: tuple[float, str] | None = None

    @classmethod
    def at(
        cls,
        urls: Sequence[str],
        *,
        token: str | None = None,
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
        insecure: bool = False,
        on_epoch: Callable[[str], None] = lambda _: None,
        on_fields: Callable[[], None] = lambda: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> "Servers":
        """Parse URLs and load certificates. Raises ValueError, OSError, ssl.SSLError."""
        if not urls:
            raise ValueError("expected the URL of a discovery server")
        parsed = [parse_server_url(url, insecure=insecure) for url in urls]
        tls = TlsFiles(ca_file, cert_file, key_file)
        return cls(parsed, token=token, tls=tls, on_epoch=on_epoch, on_fields=on_fields, wall_clock=wall_clock)

    @property
    def current(self) -> URL:
        """The server in use."""
        return self._urls[self._index]

    @property
    def count(self) -> int:
        """Number of servers."""
        return len(self._urls)

    def fields(self, url: URL) -> frozenset[str]:
        """Return the negotiated fields of records that a server knows; none before its first answer."""
        return self._fields.get(url, frozenset())

    def use_token(self, token: str | None) -> None:
        """Use this token from the next request on."""
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}

    def failed(self, url: URL) -> None:
        """Switch from this server to the next, unless that has already been done."""
        if self._urls[self._index] == url:
            self._index = (self._index + 1) % len(self._urls)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Keep connections open. Requests need such a context; contexts may overlap."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=8)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                session, self._session = self._session, None
                await session.close()

    async def request(
        self, method: str, url: URL, path: str, body: object = None, *, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Send a request to one server. Raises ServerUnavailable, RequestRefused."""
        data = msgspec.json.encode(body) if body is not None else None
        if data is not None and len(data) > MAX_BODY:
            raise RequestRefused(413, "too_large", f"the record has {len(data)} bytes, the limit is {MAX_BODY}")
        try:
            async with self._open().request(
                method,
                url.join(URL(path)),
                data=data,
                headers={
                    **self._headers,
                    **(headers or {}),
                    **({"Content-Type": "application/json"} if data is not None else {}),
                },
                timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
                allow_redirects=False,
                ssl=self._tls.current(),
            ) as response:
                await self._check(response, 201)
                return msgspec.json.decode(await _read(response), type=dict[str, Any])
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
            raise ServerUnavailable(f"{url}: {await self._explained(url, error)}") from None

    async def anywhere(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Send a request to one server after the other, each once, until one answers. Raises ServerUnavailable, RequestRefused."""
        unavailable: ServerUnavailable | None = None
        for _ in range(self.count):
            url = self.current
            try:
                return await self.request(method, url, path, body)
            except ServerUnavailable as error:
                unavailable = error
                self.failed(url)
        assert unavailable is not None
        raise unavailable

    async def lines(self, url: URL, path: str, query: dict[str, str]) -> AsyncGenerator[bytes, None]:
        """Yield the data that a server streams, until it ends the stream. Raises ServerUnavailable, RequestRefused."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT_S, sock_read=WATCH_SILENCE_S)
        try:
            async with self._open().get(
                url.join(URL(path)),
                params=query,
                headers=self._headers,
                timeout=timeout,
                allow_redirects=False,
                ssl=self._tls.current(),
            ) as response:
                await self._check(response, 200)
                while data := await response.content.readany():
                    yield data
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ServerUnavailable(f"{url}: {await self._explained(url, error)}") from None

    async def _explained(self, url: URL, error: BaseException) -> str:
        """Describe an error. If a certificate fails because of a clock, say by how much."""
        if not is_out_of_time(error):
            return explained(error)
        now = asyncio.get_running_loop().time()
        if self._dates is None or now - self._dates[0] > DATES_AGAIN_S:
            dates = await asyncio.to_thread(certificate_dates, url.host or "", url.port or 443)
            self._dates = (now, dates)
        return f"{explained(error)}; {self._dates[1]}" if self._dates[1] else explained(error)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("requests must be made inside connected()")
        return self._session

    def _note_fields(self, response: aiohttp.ClientResponse) -> None:
        url = response.url.origin()
        fields = NEGOTIATED.intersection(response.headers.get(FIELDS_HEADER, "").split(","))
        if fields != self._fields.get(url):
            self._fields[url] = fields
            self._on_fields()

    def _note_clock(self, response: aiohttp.ClientResponse) -> None:
        """Compare the server's clock with ours: credentials, certificates and signatures depend on both."""
        try:
            ahead_s = parsedate_to_datetime(response.headers["Date"]).timestamp() - self._wall_clock()
        except (KeyError, ValueError, TypeError, OverflowError):
            return
        self.clock_ahead_s = round(ahead_s) if abs(ahead_s) > CLOCK_PRECISION_S else 0
        apart = abs(ahead_s) > CLOCKS_APART_S
        if apart and not self._clocks_apart:
            side = "ahead of" if ahead_s > 0 else "behind"
            why = f"the clock of {response.url.origin()} is {abs(ahead_s):.0f} s {side} ours"
            log.warning("clocks_apart", extra={"event": {"seconds": round(ahead_s), "why": why}})
        self._clocks_apart = apart

    async def _check(self, response: aiohttp.ClientResponse, most: int) -> None:
        """Raise ServerUnavailable or RequestRefused for an answer that is an error."""
        self._note_clock(response)
        epoch = response.headers.get(EPOCH_HEADER)
        if epoch:
            self._on_epoch(epoch[:64])
            self._note_fields(response)
        if 200 <= response.status <= most:
            return
        try:
            answer = msgspec.json.decode(await _read(response), type=dict[str, Any])
            code, detail = str(answer["error"])[:63], str(answer["detail"])[:300]
        except (msgspec.MsgspecError, KeyError):
            code, detail = "unknown", f"status {response.status}"
        if response.status >= 500:
            raise ServerUnavailable(f"{code}: {detail}")
        raise RequestRefused(response.status, code, detail)


class ServerRetries:
    """Growing random pauses between attempts. There is no pause until every server has been tried."""

    def __init__(self, servers: Servers, backoff: Backoff = BACKOFF) -> None:
        self._servers = servers
        self._backoff = backoff
        self._failures = 0

    def succeeded(self) -> None:
        """Reset the number of failures."""
        self._failures = 0

    def next_pause_s(self) -> float:
        """Count a failure. Returns how long to wait before the next attempt, 0 while a server has not been tried yet."""
        self._failures += 1
        rounds, more = divmod(self._failures, self._servers.count)
        return 0.0 if more and rounds == 0 else self._backoff.pause_s(rounds + 1)

    async def wait(self) -> None:
        """Wait after a failure, for `next_pause_s`."""
        await asyncio.sleep(self.next_pause_s())


async def _read(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    while chunk := await response.content.readany():
        data += chunk
        if len(data) > MAX_ANSWER:
            raise aiohttp.ClientPayloadError(f"the answer has more than {MAX_ANSWER} bytes")
    return bytes(data)
