"""The discovery server: records, leases and watches over HTTP.

    GET    /                                     a page for people; a browser gives the token as a Basic password
    GET    /healthz                              open to all
    GET    /v1/records?kind=&network=            {"epoch","revision","records"}
    GET    /v1/records/{kind}/{network}/{id}     the record, its revision as ETag too
    PUT    …                                     {"spec":{…},"lease":"…"}; If-Match: REV, If-None-Match: *
    DELETE …                                     {"revision"}
    GET    /v1/watch?from=REV&epoch=EPOCH        lines of JSON: put, delete, sync, reset
    POST   /v1/leases                            {"ttl_s":10} → {"id","ttl_s"}
    PUT    /v1/leases/{id}                       renews
    DELETE /v1/leases/{id}                       ends it and withdraws its records
    POST   /v1/turn-credentials                  {"network":"d"} → {"username","password","ttl_s","urls"}

Every answer has the store's epoch in the header Crossnet-Epoch; where the store has not been confirmed to be current for
some time, Crossnet-Stale says for how many seconds. Errors are {"error": CODE, "detail": sentence}.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery import page
from discovery.ages import Ages
from discovery.answers import (
    ApiError,
    RateLimited,
    certificate_names,
    check_browser,
    error_answer,
    json_answer,
    not_found,
    parse_if_match,
    parse_if_none_match,
    parse_key,
    parse_kind,
    parse_revision,
    parse_token,
    read_body,
)
from discovery.limits import RateLimit
from discovery.model import BadRecord, Key, Kind, Mesh, check_spec, decode_spec
from discovery.names import is_ldh_label
from discovery.page import PageState, render_page
from discovery.server_config import (
    DiscoveryServerConfig,
    ServerRefused,
    make_store,
    reload_tls,
    start_refusals,
    tls_context,
)
from discovery.shape import shown
from discovery.stamp import Stamp
from discovery.store import Lease, PreconditionFailed, Store, StoreError, UnknownLease
from discovery.tokens import OPEN, Principal, Tokens
from discovery.watch import WatchHub, mark, mark_stale
from discovery.yamlfile import BadFile

__all__ = ["EPOCH_HEADER", "DiscoveryServer", "DiscoveryServerConfig", "ServerRefused", "start_refusals"]

log = logging.getLogger(__name__)

EPOCH_HEADER = "Crossnet-Epoch"
STALE_HEADER = "Crossnet-Stale"
STALE_WATCH_S = 30.0  # at a server that is cut off: then the client is sent to look for a better one
MAX_CONFLICTS = 5  # others that write the same record at once; the sixth is not by chance
MAX_LEASE_S = 3600
SWEEP_S = 0.5  # a lease's records are gone at most this, and a write, after its end
RELOAD_S = 2.0  # how soon a changed tokens file or certificate counts
HEARTBEAT_S = 10.0
WRITE_TIMEOUT_S = 30.0  # a watcher that takes nothing for so long has gone
SHUTDOWN_TIMEOUT_S = 2.0
KEEPALIVE_S = 60.0

_CODES = (200, 201, 400, 401, 403, 404, 405, 409, 410, 412, 413, 429, 500, 503)


class _PutBody(msgspec.Struct, forbid_unknown_fields=True):
    spec: msgspec.Raw
    lease: str | None = None


class _LeaseBody(msgspec.Struct, forbid_unknown_fields=True):
    ttl_s: int = 10


class _TurnBody(msgspec.Struct, forbid_unknown_fields=True):
    network: str


Handler = Callable[[web.Request, Principal], Awaitable[web.StreamResponse]]


class _Metrics:
    """What a server counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        requests = Counter(
            "crossnet_discovery_requests", "Requests answered, by HTTP status.", ["code"], registry=registry
        )
        self.requests = {code: requests.labels(str(code)) for code in _CODES}
        self.watchers = Gauge("crossnet_discovery_watchers", "Watches that are open.", registry=registry)
        self.revision = Gauge("crossnet_discovery_revision", "Revision of the store.", registry=registry)


class DiscoveryServer:
    """One discovery server over one store.

        async with DiscoveryServer(config).serving() as addresses: …
        await DiscoveryServer(config).run()

    Both raise ServerRefused, StoreError, BadFile (tokens), ssl.SSLError or OSError when it cannot start.
    """

    def __init__(
        self,
        config: DiscoveryServerConfig,
        *,
        store: Store | None = None,
        registry: CollectorRegistry | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Take a store, or make the one that the configuration names."""
        self._config = config
        self._store = store if store is not None else make_store(config)
        self._metrics = _Metrics(registry if registry is not None else CollectorRegistry())
        self._wall_clock = wall_clock
        self._tokens: Tokens | None = None
        self._hub = WatchHub(self._store)
        self._ages = Ages(time.monotonic)
        self._store.subscribe(self._ages.take)
        self._requests = RateLimit(config.requests_per_s, config.request_burst)
        self._credentials = RateLimit(config.credentials_per_s, config.credentials_burst)
        self._warnings = RateLimit(0.1, 1)  # of the two above: a flood of requests must not become one of lines

    @property
    def store(self) -> Store:
        """The store that is served."""
        return self._store

    async def run(self) -> None:
        """Serve until cancelled."""
        async with self.serving():
            await asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[tuple[str, int], ...]]:
        """Serve as long as the context lasts; gives the addresses listened on, in the order of the configuration."""
        config = self._config
        reasons = start_refusals(config)
        if reasons:
            raise ServerRefused(reasons)
        stamps = Stamp([config.tokens_file]), Stamp([config.tls_cert, config.tls_key, config.tls_client_ca])
        self._tokens = Tokens.load(config.tokens_file) if config.tokens_file is not None else None
        tls = tls_context(config)
        await self._store.open()
        self._ages.known([record.key for record in (await self._store.snapshot()).records])
        runner = web.AppRunner(
            self._application(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            keepalive_timeout=KEEPALIVE_S,
        )
        try:
            await runner.setup()
            for host, port in config.listen:
                await web.TCPSite(runner, host, port, ssl_context=tls).start()
            addresses = tuple((str(address[0]), int(address[1])) for address in runner.addresses)
            self._log_start(addresses)
            failure: BaseException | None = None
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._sweep()), group.create_task(self._store.run())]
                tasks.append(group.create_task(self._keep_reloading(*stamps, tls)))
                try:
                    yield addresses
                except BaseException as error:  # noqa: BLE001 - raised below, and not inside an exception group
                    failure = error
                finally:
                    for task in tasks:
                        task.cancel()
            if failure is not None:
                raise failure
        finally:
            self._hub.close()
            await runner.cleanup()
            await self._store.close()

    def _log_start(self, addresses: tuple[tuple[str, int], ...]) -> None:
        config = self._config
        for host, port in addresses:
            event = {"address": host, "port": port, "tls": config.tls_cert is not None, "epoch": self._store.epoch}
            log.info("discovery server listens", extra={"event": event})
        if self._tokens is None:
            log.warning("discovery server has no tokens: whoever reaches it may write any record")
        if config.insecure:
            log.warning("discovery server is insecure by configuration")

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=self._config.max_body_bytes, middlewares=[self._answer])
        record = "/v1/records/{kind}/{network}/{id}"
        application.add_routes(
            [
                web.get("/", self._authenticated(self._page), allow_head=False),
                web.get("/page.css", self._style, allow_head=False),
                web.get("/page.js", self._script, allow_head=False),
                web.get("/healthz", self._healthz, allow_head=False),
                web.get("/v1/records", self._authenticated(self._list), allow_head=False),
                web.get(record, self._authenticated(self._get), allow_head=False),
                web.put(record, self._authenticated(self._put)),
                web.delete(record, self._authenticated(self._delete)),
                web.get("/v1/watch", self._authenticated(self._watch), allow_head=False),
                web.post("/v1/leases", self._authenticated(self._grant)),
                web.put("/v1/leases/{id}", self._authenticated(self._renew)),
                web.delete("/v1/leases/{id}", self._authenticated(self._revoke)),
                web.post("/v1/turn-credentials", self._authenticated(self._turn_credentials)),
            ]
        )
        return application

    async def _sweep(self) -> None:
        while True:
            # At once for the first time: from then on the store knows how long it stood still.
            try:
                for deletion in await self._store.expire():
                    kind, network, record_id = deletion.key
                    event = {"kind": kind, "network": network, "id": record_id, "revision": deletion.revision}
                    log.info("a lease ended, its record is withdrawn", extra={"event": event})
            except StoreError as error:
                log.error("leases cannot be ended: %s", error)
            await asyncio.sleep(SWEEP_S)

    async def _keep_reloading(self, tokens: Stamp, certificates: Stamp, tls: ssl.SSLContext | None) -> None:
        while True:
            await asyncio.sleep(RELOAD_S)
            if self._config.tokens_file is not None and tokens.changed():
                try:
                    known = await asyncio.to_thread(Tokens.load, self._config.tokens_file)
                except BadFile as error:
                    log.error("the tokens file is not taken, what it said before stays: %s", error)
                else:
                    self._tokens = known
                    ended = self._hub.keep(known.still)
                    log.info("the tokens file is read anew", extra={"event": {"tokens": len(known), "ended": ended}})
            if tls is not None and certificates.changed():
                try:
                    reload_tls(tls, self._config)
                except OSError as error:  # ssl.SSLError is one
                    log.error("the certificate is not taken, the one before stays: %s", error)
                else:
                    log.info("the certificate is read anew")

    # Around every request.

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        response: web.StreamResponse
        try:
            response = await handler(request)
        except ApiError as error:
            response = error_answer(error.status, error.code, error.detail)
            if error.status == 401 and request.path == "/":
                response.headers[hdrs.WWW_AUTHENTICATE] = 'Basic realm="crossnet: the token is the password"'
            if isinstance(error, RateLimited):
                response.headers[hdrs.RETRY_AFTER] = f"{error.wait_s + 1:.0f}"
                self._log_rate(request, error)
        except web.HTTPRequestEntityTooLarge:
            limit = self._config.max_body_bytes
            response = error_answer(413, "too_large", f"the body has more than {limit} bytes")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            response = error_answer(405, "method_not_allowed", f"expected one of {allowed}")
        except web.HTTPException as error:
            code = "not_found" if error.status == 404 else "bad_request"
            response = error_answer(404 if error.status == 404 else 400, code, "there is nothing under this path")
        except StoreError as error:
            log.warning("the store failed", extra={"event": {"path": request.path[:200], "why": str(error)[:300]}})
            response = error_answer(
                503, "unavailable", "the store cannot be reached or written; the server's log says why"
            )
        except Exception:
            log.exception("a request failed")
            response = error_answer(500, "internal", "this is a fault of the server; its log has more")
        if not response.prepared:
            response.headers.update(self._marks())
        self._metrics.requests[response.status].inc()
        self._metrics.revision.set(self._store.revision)
        return response

    def _log_rate(self, request: web.Request, error: RateLimited) -> None:
        if not self._warnings.wait_s(error.detail, time.monotonic()):
            event = {"path": request.path[:200], "remote": request.remote, "why": error.detail}
            log.warning("a request was too many", extra={"event": event})

    def _marks(self) -> dict[str, str]:
        stale_s = self._store.stale_s
        return {EPOCH_HEADER: self._store.epoch} | ({STALE_HEADER: f"{stale_s:.0f}"} if stale_s else {})

    def _authenticated(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def authenticate(request: web.Request) -> web.StreamResponse:
            principal = self._principal(request)
            wait_s = self._requests.wait_s(principal.network, time.monotonic())
            if wait_s:
                raise RateLimited(f"network {principal.network!r} asks too often", wait_s)
            return await handler(request, principal)

        return authenticate

    def _principal(self, request: web.Request) -> Principal:
        """Find who asks, by token or else by client certificate. Raises ApiError."""
        check_browser(request, named=self._tokens is not None or self._config.insecure)
        if self._tokens is None:
            return OPEN
        if hdrs.AUTHORIZATION not in request.headers:
            names = certificate_names(request)
            principal = self._tokens.find_certificate(names)
            if principal is None and names:
                raise ApiError(401, "unauthorized", f"no entry names the certificate of {shown(names[0])}")
        else:
            token = parse_token(request)
            principal = self._tokens.find(token) if token is not None else None
            if principal is None and token is not None:
                raise ApiError(401, "unauthorized", "the token is not known here")
        if principal is None:
            raise ApiError(401, "unauthorized", "expected the header Authorization: Bearer TOKEN")
        return principal

    async def _healthz(self, _: web.Request) -> web.Response:
        return json_answer({"ok": True})

    # The page.

    async def _page(self, request: web.Request, principal: Principal) -> web.Response:
        snapshot = await self._store.snapshot()
        mesh = Mesh.of(view for record in snapshot.records if (view := principal.view(record)) is not None)
        state = PageState(
            epoch=self._store.epoch,
            revision=snapshot.revision,
            stale_s=self._store.stale_s,
            reader=principal.name,
            ages=self._ages.now(),
        )
        network = request.query.get("network", "")[:63] or None
        return web.Response(
            text=render_page(mesh, state, network), content_type="text/html", headers=page.SECURITY_HEADERS
        )

    async def _style(self, _: web.Request) -> web.Response:
        return web.Response(text=page.STYLE, content_type="text/css", headers=page.SECURITY_HEADERS)

    async def _script(self, _: web.Request) -> web.Response:
        return web.Response(text=page.SCRIPT, content_type="text/javascript", headers=page.SECURITY_HEADERS)

    # Records.

    async def _list(self, request: web.Request, principal: Principal) -> web.Response:
        kind_text, network = request.query.get("kind"), request.query.get("network")
        kind = parse_kind(kind_text) if kind_text else None
        snapshot = await self._store.snapshot(kind, network or None)
        records = [view for record in snapshot.records if (view := principal.view(record)) is not None]
        records.sort(key=lambda record: record.key)
        return json_answer({"epoch": self._store.epoch, "revision": snapshot.revision, "records": records})

    async def _get(self, request: web.Request, principal: Principal) -> web.Response:
        key = parse_key(request)
        record = await self._store.get(key)
        view = principal.view(record) if record is not None else None
        if view is None:
            raise not_found(key)
        return json_answer(view, etag=view.revision)

    async def _put(self, request: web.Request, principal: Principal) -> web.Response:
        key = parse_key(request)
        self._check_may_write(principal, key)
        body = await read_body(request, _PutBody)
        try:
            spec = decode_spec(key[0], body.spec)
            check_spec(key[0], key[1], spec, self._config.allow_addresses)
        except BadRecord as error:
            raise ApiError(400, "bad_record", str(error)) from None
        if body.lease is not None:
            try:
                await self._lease_of(principal, body.lease)
            except UnknownLease as error:
                raise ApiError(409, "no_lease", str(error)) from None
        if_match, if_none_match = parse_if_match(request), parse_if_none_match(request)
        for _ in range(MAX_CONFLICTS):
            old = await self._store.get(key)
            self._check_may_write(principal, key, spec, *([old.spec] if old is not None else []))
            if old is None and await self._store.count(key[1]) >= self._config.max_records_per_network:
                limit = self._config.max_records_per_network
                raise ApiError(429, "too_many", f"network {key[1]!r} has {limit} records, which is the most")
            # What is replaced is what was looked at, so that nobody slips in what the writer may not replace.
            pin = old.revision if old is not None and if_match is None and not if_none_match else if_match
            try:
                record = await self._store.put(
                    key, spec, lease=body.lease, if_match=pin, if_none_match=if_none_match or pin is None
                )
            except PreconditionFailed as error:
                if if_match is not None or if_none_match:
                    raise ApiError(412, "precondition_failed", str(error)) from None
                continue
            except UnknownLease as error:
                raise ApiError(409, "no_lease", str(error)) from None
            self._log_write("put", principal, key, record.revision)
            return json_answer(record, status=201 if old is None else 200, etag=record.revision)
        raise ApiError(503, "unavailable", "others write this record at the same time")

    async def _delete(self, request: web.Request, principal: Principal) -> web.Response:
        key = parse_key(request)
        self._check_may_write(principal, key)
        if_match = parse_if_match(request)
        for _ in range(MAX_CONFLICTS):
            old = await self._store.get(key)
            if old is None and key[0] is Kind.SERVICE:
                raise not_found(key)  # who may delete it depends on its name
            pin = if_match
            if old is not None:
                self._check_may_write(principal, key, old.spec)
                pin = if_match if if_match is not None else old.revision
            try:
                deletion = await self._store.delete(key, if_match=pin)
            except PreconditionFailed as error:
                if if_match is not None:
                    raise ApiError(412, "precondition_failed", str(error)) from None
                continue
            if deletion is None:
                raise not_found(key)
            self._log_write("delete", principal, key, deletion.revision)
            return json_answer({"revision": deletion.revision})
        raise ApiError(503, "unavailable", "others write this record at the same time")

    def _check_may_write(self, principal: Principal, key: Key, *specs: object) -> None:
        why = principal.refusal_to_write(key, specs)  # type: ignore[arg-type]
        if why is not None:
            kind, network, record_id = key
            event = {"token": principal.name, "kind": kind, "network": network, "id": record_id, "why": why}
            log.warning("a write was refused", extra={"event": event})
            raise ApiError(403, "forbidden", why)

    def _log_write(self, what: str, principal: Principal, key: Key, revision: int) -> None:
        if log.isEnabledFor(logging.DEBUG):
            kind, network, record_id = key
            event = {"token": principal.name, "kind": kind, "network": network, "id": record_id, "revision": revision}
            log.debug("%s", what, extra={"event": event})

    # Leases.

    async def _grant(self, request: web.Request, principal: Principal) -> web.Response:
        body = await read_body(request, _LeaseBody)
        if not 1 <= body.ttl_s <= MAX_LEASE_S:
            raise ApiError(400, "bad_request", f"$.ttl_s: expected 1 to {MAX_LEASE_S} seconds, got {shown(body.ttl_s)}")
        if len(await self._store.leases(principal.owner)) >= self._config.max_leases_per_token:
            raise ApiError(429, "too_many", f"the token has {self._config.max_leases_per_token} leases, the most")
        lease = await self._store.grant(body.ttl_s, principal.owner)
        return json_answer({"id": lease.id, "ttl_s": lease.ttl_s}, status=201)

    async def _renew(self, request: web.Request, principal: Principal) -> web.Response:
        try:
            lease = await self._lease_of(principal, request.match_info["id"])
            await self._store.renew(lease.id)
        except UnknownLease as error:
            raise ApiError(410, "lease_gone", str(error)) from None
        return json_answer({"id": lease.id, "ttl_s": lease.ttl_s})

    async def _revoke(self, request: web.Request, principal: Principal) -> web.Response:
        try:
            lease = await self._lease_of(principal, request.match_info["id"])
            deletions = await self._store.revoke(lease.id)
        except UnknownLease as error:
            raise ApiError(410, "lease_gone", str(error)) from None
        return json_answer({"withdrawn": len(deletions), "revision": self._store.revision})

    async def _lease_of(self, principal: Principal, lease_id: str) -> Lease:
        lease = await self._store.lease(lease_id[:64])
        if lease is None:
            raise UnknownLease(lease_id[:64])
        if lease.owner != principal.owner:
            log.warning("another token's lease was refused", extra={"event": {"token": principal.name}})
            raise ApiError(403, "forbidden", "the lease is another token's")
        return lease

    # Watching.

    async def _watch(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        revision = parse_revision(request.query.get("from"))
        if len(self._hub) >= self._config.max_watchers:
            raise ApiError(429, "too_many", f"{self._config.max_watchers} watches are open, which is the most")
        response = web.StreamResponse(headers={**self._marks(), hdrs.CACHE_CONTROL: "no-store"})
        ends_at = time.monotonic() + STALE_WATCH_S if self._store.stale_s else 0.0
        response.content_type = "application/x-ndjson"
        watcher = self._hub.add(principal)
        self._metrics.watchers.set(len(self._hub))
        try:
            # Changes are queued from here on; those that the backlog has already are skipped by their revision.
            current, backlog = await self._hub.backlog(principal, revision, request.query.get("epoch"))
            async with asyncio.timeout(WRITE_TIMEOUT_S) as deadline:

                async def write(data: bytes) -> None:
                    deadline.reschedule(asyncio.get_running_loop().time() + WRITE_TIMEOUT_S)
                    await response.write(data)

                await response.prepare(request)
                for batch in backlog:
                    await write(batch)
                    await asyncio.sleep(0)  # a large backlog is encoded piece by piece, others get their turn
                if ends_at:
                    await write(mark_stale(self._store.revision, self._store.stale_s))
                while not watcher.overrun:
                    data = watcher.take(current)
                    if data:
                        await write(data)
                        continue
                    if watcher.closed:
                        return response
                    deadline.reschedule(None)
                    try:
                        async with asyncio.timeout(HEARTBEAT_S):
                            await watcher.wait()
                    except TimeoutError:
                        stale_s = self._store.stale_s
                        if stale_s and time.monotonic() > ends_at:
                            return response  # there may be a server that is not cut off
                        await write(mark_stale(self._store.revision, stale_s) if stale_s else b"\n")
                await write(mark("reset", self._store.revision, self._store.epoch))
                log.info("a slow watcher was cut off", extra={"event": {"token": principal.name}})
        except TimeoutError:
            log.info("a watcher that took nothing was cut off", extra={"event": {"token": principal.name}})
            if request.transport is not None:
                request.transport.abort()
        except ConnectionResetError:
            pass  # the reader has gone, as readers do
        finally:
            self._hub.remove(watcher)
            self._metrics.watchers.set(len(self._hub))
        return response

    # TURN credentials.

    async def _turn_credentials(self, request: web.Request, principal: Principal) -> web.Response:
        body = await read_body(request, _TurnBody)
        why = principal.refusal_of_credentials()
        if why is not None:
            log.warning("credentials were refused", extra={"event": {"token": principal.name, "why": why}})
            raise ApiError(403, "forbidden", why)
        if not is_ldh_label(body.network):
            raise ApiError(400, "bad_request", f"$.network: expected a network id, got {shown(body.network)}")
        secret = self._config.turn_secrets.get(body.network)
        if secret is None:
            raise ApiError(
                404, "not_found", f"there is no secret to issue credentials for network {body.network!r} from"
            )
        wait_s = self._credentials.wait_s(principal.network, time.monotonic())
        if wait_s:
            raise RateLimited(f"network {principal.network!r} asks for credentials too often", wait_s)
        ttl_s = self._config.turn_credential_ttl_s
        username = f"{int(self._wall_clock()) + ttl_s}:{principal.network or 'admin'}.{principal.name}"
        digest = hmac.digest(secret.encode(), username.encode(), hashlib.sha1)
        event = {"token": principal.name, "network": principal.network, "for": body.network, "username": username}
        log.info("turn credentials were issued", extra={"event": event})
        mesh = Mesh.of((await self._store.snapshot(Kind.TURN, body.network)).records)
        return json_answer(
            {
                "username": username,
                "password": base64.b64encode(digest).decode(),
                "ttl_s": ttl_s,
                "urls": [turn.spec.url for turn in mesh.turns(body.network)],
            }
        )
