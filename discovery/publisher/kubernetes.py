"""A client of the Kubernetes API: lists objects, then watches them from that version on."""

import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Self

import aiohttp
import msgspec
from yarl import URL

from discovery.files.tls_files import TlsFiles
from discovery.http.errors import explained
from discovery.publisher.objects import resource_version

log = logging.getLogger(__name__)

PAGE = 500
MAX_PAGES = 1000
"""Half a million objects; Kubernetes itself is tested with a tenth of that."""

REQUEST_TIMEOUT_S = 30.0
WATCH_S = 240
"""The server is asked to end watches after this time, so that one that hangs is noticed soon afterwards."""

FIELD_MANAGER = "crossnet-publisher"
MAX_ANSWER = 64 * 1024 * 1024
MAX_TOKEN = 64 * 1024
MAX_LINE = 4 * 1024 * 1024  # objects in etcd have 1.5 MiB at most


class KubeError(Exception):
    """The Kubernetes API cannot be reached, or answered with an error."""


class Gone(KubeError):
    """The history after this resourceVersion is no longer available (HTTP 410): all objects must be listed again."""


class KubeRefused(KubeError):
    """The Kubernetes API understood a request and refused it. `status` is the HTTP status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class KubeApi:
    """Lists, watches, creates and patches objects, inside of `async with`."""

    def __init__(
        self, url: str, *, token_file: Path | None, ca_file: Path | None, page: int = PAGE, watch_s: int = WATCH_S
    ) -> None:
        """`page` is the number of objects in one request of a list.

        Raises OSError or ssl.SSLError for a bad CA file, ValueError for a bad URL.
        """
        self._page = page
        self._watch_s = watch_s
        self._url = URL(url)
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ValueError(f"expected https://HOST:PORT of a Kubernetes API, got {url[:100]!r}")
        self._token_file = token_file
        self._tls = TlsFiles(ca_file)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Prepare to connect."""
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8), trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def list_all(self, path: str) -> tuple[list[dict[str, Any]], str]:
        """Return all objects under a path, and the resourceVersion to watch from. Raises KubeError, Gone."""
        items: list[dict[str, Any]] = []
        query = {"limit": str(self._page)}
        for _ in range(MAX_PAGES):
            page = await self._get(path, query)
            found = page.get("items") or []
            if not isinstance(found, list):
                raise KubeError(f"{path}: the list has no items")
            items += (item for item in found if isinstance(item, dict))
            metadata = page.get("metadata")
            token = metadata.get("continue") if isinstance(metadata, dict) else None
            if not token:
                return items, resource_version(page)
            query["continue"] = str(token)
        raise KubeError(f"{path}: the list has more than {MAX_PAGES} pages")

    async def watch(self, path: str, version: str) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Yield the changes after a resourceVersion: ADDED, MODIFIED, DELETED or BOOKMARK, and the object.

        Returns when the server ends the watch. Raises KubeError, Gone.
        """
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._watch_s),
        }
        timeout = aiohttp.ClientTimeout(total=self._watch_s + REQUEST_TIMEOUT_S, sock_connect=REQUEST_TIMEOUT_S)
        rest = b""
        try:
            async with self._ask("GET", path, query, timeout) as response:
                await _check(response, path)
                while data := await response.content.readany():
                    *lines, rest = (rest + data).split(b"\n")
                    if max(map(len, [rest, *lines])) > MAX_LINE:
                        raise KubeError(f"{path}: a change has more than {MAX_LINE} bytes")
                    for line in lines:
                        if line.strip():
                            yield _change(line, path)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubeError(f"{path}: {explained(error)}") from None

    async def create(self, path: str, item: object) -> None:
        """Create an object. Raises KubeError; KubeRefused with status 409 if there is one of this name."""
        await self._write("POST", path, item, "application/json")

    async def merge(self, path: str, changes: object) -> None:
        """Replace some fields of an object (RFC 7396). Raises KubeError."""
        await self._write("PATCH", path, changes, "application/merge-patch+json")

    async def apply(self, path: str, item: object) -> None:
        """Set fields of an object by server-side apply, as their owner. Raises KubeError."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        await self._write("PATCH", path, item, "application/apply-patch+yaml", query)

    async def _write(
        self, method: str, path: str, item: object, content_type: str, query: dict[str, str] | None = None
    ) -> None:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        try:
            async with self._ask(
                method, path, query or {}, timeout, msgspec.json.encode(item), content_type
            ) as response:
                await _check(response, path)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubeError(f"{path}: {explained(error)}") from None

    async def _get(self, path: str, query: dict[str, str]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        try:
            async with self._ask("GET", path, query, timeout) as response:
                await _check(response, path)
                return msgspec.json.decode(await _read(response), type=dict[str, Any])
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
            raise KubeError(f"{path}: {explained(error)}") from None

    def _ask(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        timeout: aiohttp.ClientTimeout,
        body: bytes | None = None,
        content_type: str | None = None,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a request. Raises OSError, and KubeError for an unusable token."""
        if self._session is None:
            raise RuntimeError("requests must be made inside `async with`")
        return self._session.request(
            method,
            self._url.join(URL(path)),
            params=query,
            data=body,
            headers=self._headers() | ({"Content-Type": content_type} if content_type is not None else {}),
            timeout=timeout,
            allow_redirects=False,
            ssl=self._tls.current(),
        )

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        # Read for each request: the kubelet renews it, and the old token expires within the hour.
        with self._token_file.open("rb") as file:
            token = file.read(MAX_TOKEN).strip()
        if not token.isascii() or not (text := token.decode()).isprintable():
            raise KubeError(f"{self._token_file}: does not contain a valid token")
        return {"Authorization": f"Bearer {text}"}


def _change(line: bytes, path: str) -> tuple[str, dict[str, Any]]:
    try:
        change = msgspec.json.decode(line, type=dict[str, Any])
        kind, found = str(change["type"]), msgspec.convert(change["object"], dict[str, Any])
    except (msgspec.MsgspecError, KeyError) as error:
        raise KubeError(f"{path}: the watch sent an invalid line: {str(error)[:100]}") from None
    if kind == "ERROR":
        if found.get("code") == 410:
            raise Gone(f"{path}: {str(found.get('message'))[:200]}")
        raise KubeError(f"{path}: {str(found.get('message'))[:200]}")
    return kind, found


async def _check(response: aiohttp.ClientResponse, path: str) -> None:
    if response.status in (200, 201):
        return
    detail = (await response.content.read(2000)).decode(errors="replace")
    try:
        detail = str(msgspec.json.decode(detail, type=dict[str, Any]).get("message"))
    except msgspec.MsgspecError:
        pass
    if response.status == 410:
        raise Gone(f"{path}: {detail[:200]}")
    raise KubeRefused(response.status, f"{path}: status {response.status}: {detail[:200]}")


async def _read(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    while piece := await response.content.readany():
        data += piece
        if len(data) > MAX_ANSWER:
            raise aiohttp.ClientPayloadError(f"the answer has more than {MAX_ANSWER} bytes")
    return bytes(data)
