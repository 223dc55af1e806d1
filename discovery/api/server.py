"""The discovery server: its life cycle, routes, authentication, rate limits and error answers."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, Counter, Gauge

from discovery.api.config import (
    DiscoveryServerConfig,
    ServerRefused,
    listener_limits,
    make_store,
    start_refusals,
    tls_context,
)
from discovery.api.credentials import CredentialsRoute
from discovery.api.leases import LeaseRoutes
from discovery.api.messages import (
    ApiError,
    RateLimited,
    certificate_names,
    check_browser,
    error_answer,
    http_error_answer,
    json_answer,
    marks,
    parse_token,
)
from discovery.api.page_route import PageRoutes
from discovery.api.records import RecordRoutes
from discovery.api.timing import TIMING, ServerTiming
from discovery.api.tokens import OPEN, Principal, Tokens, hash_token
from discovery.api.watchers import LIMITS, WatchHub, WatchLimits
from discovery.api.watching import WatchRoute
from discovery.files.fingerprint import FileFingerprint
from discovery.files.yaml_file import BadFile
from discovery.http.listener import Connection, Listener, address_of
from discovery.http.rate_limit import RateLimit
from discovery.model.validation import shown
from discovery.store import Store, StoreError

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 2.0

STRANGER_REQUESTS_PER_S = 10.0
STRANGER_BURST = 20
"""Requests of an address without a valid token before it has to take turns."""

STRANGERS_PER_S = 100.0
STRANGERS_BURST = 100
"""The same, for all such addresses together."""

_CODES = (200, 201, 400, 401, 403, 404, 405, 409, 410, 412, 413, 429, 500, 503)


Handler = Callable[[web.Request, Principal], Awaitable[web.StreamResponse]]


class _Metrics:
    """Metrics of the server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        requests = Counter(
            "crossnet_discovery_requests", "Requests answered, by HTTP status.", ["code"], registry=registry
        )
        self.requests = {code: requests.labels(str(code)) for code in _CODES}
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
        timing: ServerTiming = TIMING,
        watch_limits: WatchLimits = LIMITS,
    ) -> None:
        """`store` replaces the store that the configuration names. Raises StoreError."""
        self._config = config
        self._timing = timing
        self._store = store if store is not None else make_store(config)
        registry = registry if registry is not None else CollectorRegistry()
        self._metrics = _Metrics(registry)
        self._tokens: Tokens | None = None
        self._hub = WatchHub(
            self._store,
            most=config.max_watchers,
            most_per_network=config.max_watchers_per_network,
            limits=watch_limits,
        )
        self._page = PageRoutes(self._store)
        self._listening = Listener("discovery_server", listener_limits(config), registry, timing.connections)
        self._records = RecordRoutes(self._store, config, self._listening.gate)
        self._leases = LeaseRoutes(self._store, config)
        self._watch = WatchRoute(self._store, self._hub, self._listening.gate, registry, timing.watch)
        self._credentials = CredentialsRoute(self._store, config, wall_clock)
        self._requests = RateLimit(config.requests_per_s, config.request_burst)
        self._warnings = RateLimit(0.1, 1)  # a flood of requests must not become a flood of log lines
        # Clients above this rate take turns. They are refused only when their burst is used up.
        self._shares = RateLimit(config.requests_per_s, int(config.requests_per_s) or 1)
        self._strangers = RateLimit(STRANGER_REQUESTS_PER_S, STRANGER_BURST)
        self._all_strangers = RateLimit(STRANGERS_PER_S, STRANGERS_BURST)

    def reconfigure(self, config: DiscoveryServerConfig) -> None:
        """Use this configuration from now on, except for store, listeners and files."""
        self._config = config
        self._requests.per_s, self._requests.burst = config.requests_per_s, config.request_burst
        self._shares.per_s, self._shares.burst = config.requests_per_s, int(config.requests_per_s) or 1
        self._hub.most, self._hub.most_per_network = config.max_watchers, config.max_watchers_per_network
        for route in (self._records, self._leases, self._credentials):
            route.reconfigure(config)

    @property
    def config(self) -> DiscoveryServerConfig:
        """The current configuration."""
        return self._config

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
        """Serve within the context, which yields the listening addresses in the order of the configuration."""
        config = self._config
        reasons = start_refusals(config)
        if reasons:
            raise ServerRefused(reasons)
        tokens, certificates = FileFingerprint([config.tokens_file]), FileFingerprint([config.tls_cert, config.tls_key])
        authorities = FileFingerprint([config.tls_client_ca])
        self._tokens = Tokens.load(config.tokens_file) if config.tokens_file is not None else None
        tls = tls_context(config)
        await self._store.open()
        await self._page.open()
        runner = web.AppRunner(
            self._application(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        listening = self._listening
        try:
            listening.open(runner, config.listen, tls)
            self._log_start(listening.addresses)
            failure: BaseException | None = None
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._sweep()), group.create_task(self._store.run())]
                tasks.append(group.create_task(listening.run()))
                tasks.append(group.create_task(self._keep_tokens(tokens)))
                tasks.append(group.create_task(self._keep_certificates(certificates, authorities)))
                try:
                    yield listening.addresses
                except BaseException as error:  # noqa: BLE001 - raised below, outside of the exception group
                    failure = error
                finally:
                    for task in tasks:
                        task.cancel()
            if failure is not None:
                raise failure
        finally:
            self._hub.close()
            listening.close()
            await runner.cleanup()
            await self._store.close()

    def _log_start(self, addresses: tuple[tuple[str, int], ...]) -> None:
        config = self._config
        for host, port in addresses:
            event = {"address": host, "port": port, "tls": config.tls_cert is not None, "epoch": self._store.epoch}
            log.info("discovery server listens", extra={"event": event})
        if self._tokens is None:
            log.warning("discovery server has no tokens: every client that reaches it may write any record")
        if config.insecure:
            log.warning("discovery server is insecure by configuration")

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=self._config.max_body_bytes, middlewares=[self._answer])
        application.add_routes(self.routes())
        return application

    def routes(self) -> tuple[web.RouteDef, ...]:
        """All routes. `openapi.yaml` describes them; a test compares the two."""
        records, leases = self._records, self._leases
        record = "/v1/records/{kind}/{network}/{id}"
        return (
            web.get("/", self._authenticated(self._page.show), allow_head=False),
            web.get("/page.css", self._page.style, allow_head=False),
            web.get("/page.js", self._page.script, allow_head=False),
            web.get("/healthz", self._healthz, allow_head=False),
            web.get("/v1/records", self._authenticated(records.list), allow_head=False),
            web.get(record, self._authenticated(records.get), allow_head=False),
            web.put(record, self._authenticated(records.put)),
            web.delete(record, self._authenticated(records.delete)),
            web.get("/v1/watch", self._authenticated(self._watch.watch), allow_head=False),
            web.post("/v1/leases", self._authenticated(leases.grant)),
            web.put("/v1/leases/{id}", self._authenticated(leases.renew)),
            web.delete("/v1/leases/{id}", self._authenticated(leases.revoke)),
            web.post("/v1/turn-credentials", self._authenticated(self._credentials.issue)),
        )

    async def _sweep(self) -> None:
        while True:
            # The first sweep is done at once: the store measures from then on whether this process was stopped.
            try:
                for deletion in await self._store.expire():
                    kind, network, record_id = deletion.key
                    event = {"kind": kind, "network": network, "id": record_id, "revision": deletion.revision}
                    log.info("a lease ended, its record was deleted", extra={"event": event})
            except StoreError as error:
                log.error("leases cannot be ended: %s", error)
            await asyncio.sleep(self._timing.sweep_s)

    async def _keep_tokens(self, stamp: FileFingerprint) -> None:
        path = self._config.tokens_file
        while path is not None:
            await asyncio.sleep(self._timing.reload_s)
            if not stamp.has_settled():
                continue
            try:
                known = await asyncio.to_thread(Tokens.load, path)
            except BadFile as error:
                log.error("the tokens file cannot be used, the previous one stays in force: %s", error)
            else:
                self._tokens = known
                ended = self._hub.keep(known.still)
                log.info("the tokens file was reloaded", extra={"event": {"tokens": len(known), "ended": ended}})

    async def _keep_certificates(self, certificates: FileFingerprint, authorities: FileFingerprint) -> None:
        while self._config.tls_cert is not None:
            await asyncio.sleep(self._timing.reload_s)
            ours, theirs = certificates.has_settled(), authorities.has_settled()
            if not (ours or theirs):
                continue
            try:
                self._listening.renew(tls_context(self._config))
            except OSError as error:  # ssl.SSLError is one
                log.error("the certificate cannot be used, the previous one stays in use: %s", error)
            else:
                ended = self._listening.cut_certified() if theirs else 0
                log.info("the certificate was reloaded", extra={"event": {"ended": ended}})

    # Around each request.

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        protocol = request.protocol
        if isinstance(protocol, Connection):
            protocol.busy = True
        try:
            return await self._answered(request, handler)
        finally:
            if isinstance(protocol, Connection):
                protocol.busy = False

    async def _answered(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        response: web.StreamResponse
        who: Principal | ApiError
        try:
            who = self._principal(request)
        except ApiError as refusal:
            who = refusal
        try:
            await self._turn(request, who)
            response = await handler(request)
        except ApiError as error:
            response = error_answer(error.status, error.code, error.detail)
            if error.status == 401 and request.path == "/":
                response.headers[hdrs.WWW_AUTHENTICATE] = 'Basic realm="crossnet: the token is the password"'
            if isinstance(error, RateLimited):
                response.headers[hdrs.RETRY_AFTER] = f"{error.wait_s + 1:.0f}"
                self._log_rate(request, error)
            elif error.status in (401, 403):
                _log_refusal(request, who, error)
        except web.HTTPException as error:
            response = http_error_answer(error, self._config.max_body_bytes)
        except StoreError as error:
            log.warning("the store failed", extra={"event": {"path": request.path[:200], "why": str(error)[:300]}})
            response = error_answer(
                503, "unavailable", "the store cannot be reached or written; the server's log says why"
            )
        except Exception:
            log.exception("a request failed")
            response = error_answer(500, "internal", "internal error; the server's log has the details")
        if not response.prepared:
            response.headers.update(marks(self._store))
        self._metrics.requests[response.status].inc()
        self._metrics.revision.set(self._store.revision)
        return response

    def _log_rate(self, request: web.Request, error: RateLimited) -> None:
        if not self._warnings.wait_s(error.detail, time.monotonic()):
            event = {"path": request.path[:200], "remote": request.remote, "why": error.detail}
            log.warning("a request exceeded its rate limit", extra={"event": event})

    async def _turn(self, request: web.Request, who: Principal | ApiError) -> None:
        """Wait for the request's turn if its client sends more than its share."""
        now = time.monotonic()
        # Both are counted: a network with many connections is as heavy as one busy connection.
        crowd = self._listening.crowds(request)
        if isinstance(who, Principal):
            asks = f"network {who.network}"
            crowd |= self._shares.wait_s(asks, now) > 0
        else:
            asks = f"address {address_of(request)}"
            crowd |= self._strangers.wait_s(asks, now) > 0 or self._all_strangers.wait_s("all", now) > 0
        await self._listening.gate.enter(asks, crowd=crowd)

    def _authenticated(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def authenticate(request: web.Request) -> web.StreamResponse:
            who = self._principal(request)
            wait_s = self._requests.wait_s(who.network, time.monotonic())
            if wait_s:
                raise RateLimited(f"network {who.network!r} sends too many requests", wait_s)
            return await handler(request, who)

        return authenticate

    def _principal(self, request: web.Request) -> Principal:
        """Return the client, by token or else by client certificate. Raises ApiError."""
        check_browser(request, named=self._tokens is not None or self._config.insecure)
        if self._tokens is None:
            return OPEN
        if hdrs.AUTHORIZATION not in request.headers:
            names = certificate_names(request)
            principal = self._tokens.find_certificate(names)
            if principal is None and names:
                raise ApiError(
                    401, "unauthorized", f"no entry of the tokens file names the certificate of {shown(names[0])}"
                )
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


def _log_refusal(request: web.Request, who: Principal | ApiError, error: ApiError) -> None:
    """Log a refusal. Any client can cause one; the log has its own rate limit."""
    event: dict[str, object] = {"status": error.status, "remote": request.remote}
    if isinstance(who, Principal):
        event |= {"token": who.name, "of_network": who.network}
    elif token := parse_token(request):
        event["token_hash"] = hash_token(token)[
            :12
        ]  # identifies the entry of a tokens file without revealing the token
    event |= {"method": request.method, "path": request.path[:200], "why": error.detail}
    log.warning("request_refused", extra={"event": event})
