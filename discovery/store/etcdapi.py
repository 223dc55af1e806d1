"""A client of etcd v3 over its JSON gateway: calls and watches, at one of several endpoints.

The gateway carries the same messages as gRPC: bytes as base64, 64-bit numbers as strings, and without fields that are zero.
Tested with etcd 3.4, whose gateway is at /v3.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from discovery.files.tls_files import TlsFiles
from discovery.http.errors import explained

DEFAULT_PREFIX = "/crossnet/"
MAX_ANSWER = 64 * 1024 * 1024  # a page of 500 records of the largest kind has some 20 MB
MAX_LINE = 64 * 1024 * 1024  # etcd puts up to 1,000 changes into one line when a watch catches up

UNAVAILABLE = 14
COMPACTED = 11  # gRPC's OUT_OF_RANGE: the history that was asked for has been compacted
NOT_FOUND = 5
UNAUTHENTICATED = 16
OLD_REVISION = "revision of auth store is old"
"""Text of etcd's error if users or rights have changed since a token was issued. Its code is only "bad request"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdTiming:
    """Timeouts and intervals, in seconds. Tests shorten them."""

    call_s: float = 2.0
    """For one call, at all members together. Below the 3 s that our clients wait, so that they get an error, not a timeout."""

    connect_s: float = 1.0
    """For one TCP connect, so that there is time to try another member."""

    open_s: float = 10.0
    """How long `EtcdStore.open` tries to reach the cluster."""

    probe_s: float = 1.0
    """Pause between two reads that show that the watched member is not behind."""

    stale_after_s: float = 4.0
    """Reads count as stale after this time without a successful probe: two probes that failed, or an election."""

    reach_s: float = 0.7
    """How long a write waits for the watch to deliver it. Together with `call_s` still below a client's 3 s."""

    retry_s: float = 0.2
    """Pause after a failure."""


TIMING = EtcdTiming()


class EtcdError(Exception):
    """etcd cannot be reached or returned an error. `code` is gRPC's, None if there was no answer."""

    def __init__(self, detail: str, code: int | None = None, *, unsent: bool = False) -> None:
        """`unsent`: the request has not reached etcd, so even a write can be sent to another member."""
        super().__init__(detail)
        self.code = code
        self.unsent = unsent


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAccess:
    """Where an etcd cluster is, and how to authenticate to it."""

    endpoints: tuple[str, ...]
    """URLs of its members, the preferred one first."""

    prefix: str = DEFAULT_PREFIX
    """Prefix of our keys, so that several meshes can share a cluster."""

    ca: Path | None = None
    """CA that verifies the members; the system's CAs by default."""

    cert: Path | None = None
    key: Path | None = None
    """Our client certificate, for a cluster that requires one."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    """User of a cluster with authentication enabled. etcd does not accept certificates for that through the gateway."""


def parse_endpoints(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of URLs. Raises ValueError."""
    found = []
    for item in text.split(","):
        expected = f"expected http(s)://HOST:PORT, got {item[:80]!r}"
        try:
            url = URL(item)
            good = url.scheme in ("http", "https") and url.host and url.port and url.raw_path in ("", "/")
        except ValueError:
            raise ValueError(expected) from None
        if not good or url.query_string or url.fragment or url.user is not None:
            raise ValueError(expected)
        found.append(str(url.origin()))
    return tuple(found)


def text_of(value: str | bytes) -> str:
    """Encode bytes for the gateway."""
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()


def bytes_of(value: object) -> bytes:
    """Decode bytes from the gateway; a missing value is empty. Raises EtcdError."""
    try:
        return base64.b64decode(str(value or ""), validate=True)
    except ValueError:
        raise EtcdError("an answer has bytes that are not base64") from None


def number_of(message: Mapping[str, Any], name: str) -> int:
    """Return a 64-bit number of a message; a missing one is 0. Raises EtcdError."""
    try:
        return int(message.get(name) or 0)
    except (TypeError, ValueError):
        raise EtcdError(f"an answer has no number as {name}") from None


def range_end(prefix: str) -> str:
    """Return the end of the range of keys with a prefix: the prefix with its last byte increased by one."""
    data = prefix.encode()
    return text_of(data[:-1] + bytes([data[-1] + 1]))


class Etcd:
    """Sends calls to one member as long as that works, then to the next."""

    def __init__(self, access: EtcdAccess, timing: EtcdTiming = TIMING) -> None:
        """Call `open` before anything else. Raises OSError, ssl.SSLError for files that cannot be used."""
        self._access = access
        self._timing = timing
        self._token: str | None = None
        self._authenticating = asyncio.Lock()
        self._urls = [URL(endpoint) for endpoint in access.endpoints]
        self._index = 0
        self._session: aiohttp.ClientSession | None = None
        secure = any(url.scheme == "https" for url in self._urls)
        self._tls = TlsFiles(access.ca, access.cert, access.key) if secure else None

    @property
    def current(self) -> URL:
        """The member in use."""
        return self._urls[self._index]

    def failed(self, url: URL) -> None:
        """Switch from this member to the next, unless that has already been done."""
        if self.current == url:
            self._index = (self._index + 1) % len(self._urls)

    def open(self) -> None:
        """Prepare to connect."""
        connector = aiohttp.TCPConnector(limit=64)
        self._session = aiohttp.ClientSession(connector=connector, trust_env=False)

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def call(self, path: str, message: Mapping[str, Any], *, repeatable: bool = False) -> dict[str, Any]:
        """Call a member, or the next one if it cannot be reached, all within `call_s`. Raises EtcdError.

        A write that may have arrived is not sent to another member: it could be done twice, and a condition that was true the
        first time would be false the second time. Calls that only read are `repeatable`.
        """
        error = EtcdError("no member of etcd answered in time")
        try:
            async with asyncio.timeout(self._timing.call_s):
                for _ in self._urls:
                    url = self.current
                    try:
                        return await self._call(url, path, message)
                    except EtcdError as refusal:
                        if refusal.code not in (None, UNAVAILABLE):
                            raise
                        error = refusal
                        self.failed(url)
                        if not (repeatable or refusal.unsent):
                            raise
        except TimeoutError:
            self.failed(url)
        raise error

    async def call_at(self, url: URL, path: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Call this member only. Raises EtcdError."""
        try:
            async with asyncio.timeout(self._timing.call_s):
                return await self._call(url, path, message)
        except TimeoutError:
            raise EtcdError(f"{url}: no answer within {self._timing.call_s:g} s") from None

    async def watch(self, url: URL, prefix: str, revision: int) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the results of a watch on a prefix, starting at a revision. Raises EtcdError when the watch ends."""
        create = {"key": text_of(prefix), "range_end": range_end(prefix), "start_revision": str(revision)}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timing.connect_s)
        token = await self._token_from(url, None) if self._token is None else self._token
        rest = b""
        try:
            async with self._opened().post(
                url.join(URL("/v3/watch")),
                data=msgspec.json.encode({"create_request": create}),
                timeout=timeout,
                headers=_headers(token),
                ssl=self._tls.current() if self._tls is not None else True,
            ) as response:
                while data := await response.content.readany():
                    *lines, rest = (rest + data).split(b"\n")
                    if max(map(len, [rest, *lines])) > MAX_LINE:
                        raise EtcdError(f"{url}: a change has more than {MAX_LINE} bytes")
                    for line in lines:
                        if line:
                            yield _result(line, url)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EtcdError(f"{url}: {explained(error)}") from None
        finally:
            # The token may have been the reason, which etcd reports in several ways. A new one costs little.
            if self._token == token:
                self._token = None
        raise EtcdError(f"{url}: the watch ended")

    async def _call(self, url: URL, path: str, message: Mapping[str, Any]) -> dict[str, Any]:
        token = await self._token_from(url, None) if self._token is None else self._token
        try:
            return await self._post(url, path, message, token)
        except EtcdError as error:
            if token is None or (error.code != UNAUTHENTICATED and OLD_REVISION not in str(error)):
                raise
        # The token has expired, or the member was restarted. The call was not carried out.
        return await self._post(url, path, message, await self._token_from(url, token))

    async def _token_from(self, url: URL, expired: str | None) -> str | None:
        """Request a token that replaces an expired one. Returns None if there is no username. Raises EtcdError.

        Only one is requested at a time, and all callers that wait share it: each costs etcd a tenth of a second of hashing.
        """
        name = self._access.username
        if name is None:
            return None
        async with self._authenticating:
            if self._token is None or self._token == expired:
                asked = {"name": name, "password": self._access.password or ""}
                token = (await self._post(url, "auth/authenticate", asked, None)).get("token")
                if not isinstance(token, str) or not token.isprintable():
                    raise EtcdError(f"{url}: the answer to an authentication has no token")
                self._token = token
            return self._token

    async def _post(self, url: URL, path: str, message: Mapping[str, Any], token: str | None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=self._timing.call_s, sock_connect=self._timing.connect_s)
        data = msgspec.json.encode(message)
        try:
            async with self._opened().post(
                url.join(URL(f"/v3/{path}")),
                data=data,
                timeout=timeout,
                headers=_headers(token),
                ssl=self._tls.current() if self._tls is not None else True,
            ) as response:
                body = bytearray()
                while piece := await response.content.readany():
                    body += piece
                    if len(body) > MAX_ANSWER:
                        raise EtcdError(f"{url}: an answer has more than {MAX_ANSWER} bytes")
                answer = msgspec.json.decode(bytes(body), type=dict[str, Any])
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise EtcdError(f"{url}: {explained(error)}", unsent=True) from None
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
            raise EtcdError(f"{url}: {explained(error)}") from None
        if response.status != 200:
            raise EtcdError(f"{url}: {str(answer.get('error'))[:200]}", number_of(answer, "code"))
        return answer

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise EtcdError("the store is closed")
        return self._session


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": token} if token is not None else {}


def _result(line: bytes, url: URL) -> dict[str, Any]:
    try:
        message = msgspec.json.decode(line, type=dict[str, Any])
        error = message.get("error")
        if error is not None:
            raise EtcdError(
                f"{url}: {str(error)[:200]}", number_of(error, "grpc_code") if isinstance(error, dict) else None
            )
        return msgspec.convert(message["result"], dict[str, Any])
    except (msgspec.MsgspecError, KeyError) as bad:
        raise EtcdError(f"{url}: the watch sent an invalid line: {str(bad)[:100]}") from None
