"""Requests and answers of the HTTP API: parsing requests, building answers."""

import asyncio
import base64
from ipaddress import ip_address
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web

from discovery.http.listener import waiting
from discovery.model.mesh import BadRecord, Key, Kind, check_key
from discovery.model.spec import NEGOTIATED
from discovery.model.validation import shown
from discovery.store import Store

EPOCH_HEADER = "Crossnet-Epoch"
STALE_HEADER = "Crossnet-Stale"
FIELDS_HEADER = "Crossnet-Fields"
FIELDS = ",".join(sorted(NEGOTIATED))
MAX_FIELDS_TEXT = 1000
BODY_TIMEOUT_S = 10.0

BodyT = TypeVar("BodyT")


class ApiError(Exception):
    """A request that is answered with an error: an HTTP status, a code for programs, and a sentence for people."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


class RateLimited(ApiError):
    """Too many requests; the client may try again in `wait_s` seconds."""

    def __init__(self, detail: str, wait_s: float) -> None:
        super().__init__(429, "rate_limited", detail)
        self.wait_s = wait_s


def parse_token(request: web.Request) -> str | None:
    """Return the token: Bearer or, for GET, the password of Basic, since browsers can send only that."""
    scheme, _, rest = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic" and request.method == hdrs.METH_GET:
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return None


def certificate_names(request: web.Request) -> list[str]:
    """Return the URIs and DNS names of the client's verified certificate, if it has one."""
    certificate = request.get_extra_info("peercert") or {}
    return [str(value) for kind, value in certificate.get("subjectAltName", ()) if kind in ("URI", "DNS")]


def check_browser(request: web.Request, *, named: bool) -> None:
    """Refuse requests that a page of another site makes with its visitor's rights. Raises ApiError.

    Without tokens (not `named`) every client that reaches this server has all rights. Then only addresses and localhost are
    accepted as the host, so that an attacker cannot point a DNS name here (DNS rebinding).
    """
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "forbidden", "the request was made by a page of another site")
    if not named:
        host = ""
        try:
            host = request.url.host or ""  # ValueError: the Host header can be anything
            ip_address(host)
        except ValueError:
            if host != "localhost":
                raise ApiError(
                    403, "forbidden", "a server without tokens must be addressed by IP address or as localhost"
                ) from None


async def read_body(request: web.Request, shape: type[BodyT]) -> BodyT:
    """Read and decode the body. Raises ApiError, and web.HTTPRequestEntityTooLarge."""
    try:
        with waiting(request):
            async with asyncio.timeout(BODY_TIMEOUT_S):
                data = await request.read()
    except TimeoutError:
        raise ApiError(400, "bad_request", f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    except web.RequestPayloadError:
        raise ApiError(
            400, "bad_request", "the body does not match its Transfer-Encoding or Content-Encoding"
        ) from None
    try:
        return msgspec.json.decode(data, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "bad_request", f"the body: {str(error)[:200]}") from None


def marks(store: Store) -> dict[str, str]:
    """Return the headers of every answer: the store's epoch, the negotiated fields that this server knows and, if the store is
    stale, for how many seconds.
    """
    stale_s = store.stale_s
    return {EPOCH_HEADER: store.epoch, FIELDS_HEADER: FIELDS} | ({STALE_HEADER: f"{stale_s:.0f}"} if stale_s else {})


def json_answer(value: object, *, status: int = 200, etag: int | None = None) -> web.Response:
    """Build a JSON answer, with a revision as its ETag if there is one."""
    headers = {hdrs.ETAG: f'"{etag}"'} if etag is not None else None
    return web.Response(
        body=msgspec.json.encode(value) + b"\n", status=status, headers=headers, content_type="application/json"
    )


def error_answer(status: int, code: str, detail: str) -> web.Response:
    """Build an error answer: a status, a code for programs, and a sentence for people."""
    response = json_answer({"error": code, "detail": detail}, status=status)
    if status == 401:
        response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    return response


def http_error_answer(error: web.HTTPException, max_body_bytes: int) -> web.Response:
    """Build the answer to an error that aiohttp raised: a bad path, method or length of the body."""
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return error_answer(413, "too_large", f"the body has more than {max_body_bytes} bytes")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        response = error_answer(405, "method_not_allowed", f"expected one of {allowed}")
        response.headers[hdrs.ALLOW] = allowed
        return response
    if error.status == 404:
        return error_answer(404, "not_found", "there is nothing under this path")
    return error_answer(400, "bad_request", f"expected a request that HTTP allows here, got {error.reason}")


def not_found(key: Key) -> ApiError:
    """Return the error for a record that does not exist, or that the client may not see."""
    return ApiError(404, "not_found", f"there is no record {'/'.join(key)}")


def parse_kind(text: str) -> Kind:
    """Parse a kind. Raises ApiError."""
    try:
        return Kind(text)
    except ValueError:
        raise ApiError(400, "bad_request", f"expected a kind of {', '.join(Kind)}, got {shown(text)}") from None


def parse_key(request: web.Request) -> Key:
    """Parse the key in a path. Raises ApiError."""
    kind = parse_kind(request.match_info["kind"])
    network, record_id = request.match_info["network"], request.match_info["id"]
    try:
        check_key(kind, network, record_id)
    except BadRecord as error:
        raise ApiError(400, "bad_record", str(error)) from None
    return (kind, network, record_id)


def parse_revision(text: str | None) -> int | None:
    """Parse a revision; None if the text is empty or missing. Raises ApiError."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ApiError(400, "bad_request", f"expected a revision, got {shown(text)}")
    return int(text)


def parse_fields(text: str | None) -> frozenset[str]:
    """Parse the negotiated fields that a reader knows. Those that this server does not know are ignored."""
    return NEGOTIATED.intersection((text or "")[:MAX_FIELDS_TEXT].split(","))


def parse_if_match(request: web.Request) -> int | None:
    """Parse the header If-Match, with or without quotes. Raises ApiError."""
    text = request.headers.get(hdrs.IF_MATCH)
    return parse_revision(text.strip().removeprefix('"').removesuffix('"')) if text else None


def parse_if_none_match(request: web.Request) -> bool:
    """Parse the header If-None-Match, of which only `*` is supported. Raises ApiError."""
    text = request.headers.get(hdrs.IF_NONE_MATCH)
    if text not in (None, "*"):
        raise ApiError(400, "bad_request", "expected If-None-Match: *")
    return text is not None
