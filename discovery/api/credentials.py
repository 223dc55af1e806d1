"""Short-lived TURN credentials, made from the secret that this server shares with a TURN server (the REST scheme)."""

import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Callable

import msgspec
from aiohttp import web

from discovery.api.config import DiscoveryServerConfig
from discovery.api.messages import ApiError, RateLimited, json_answer, read_body
from discovery.api.tokens import Principal
from discovery.http.rate_limit import RateLimit
from discovery.model.mesh import Kind, Mesh
from discovery.model.names import is_ldh_label
from discovery.model.validation import shown
from discovery.store import Store

log = logging.getLogger(__name__)


class _TurnBody(msgspec.Struct, forbid_unknown_fields=True):
    network: str


class CredentialsRoute:
    """The route POST /v1/turn-credentials."""

    def __init__(self, store: Store, config: DiscoveryServerConfig, wall_clock: Callable[[], float]) -> None:
        self._store = store
        self._config = config
        self._wall_clock = wall_clock
        self._limit = RateLimit(config.credentials_per_s, config.credentials_burst)

    def reconfigure(self, config: DiscoveryServerConfig) -> None:
        """Use this configuration from now on."""
        self._config = config

    async def issue(self, request: web.Request, principal: Principal) -> web.Response:
        """Make credentials for the TURN servers of a network. Raises ApiError."""
        body = await read_body(request, _TurnBody)
        why = principal.refusal_of_credentials()
        if why is not None:
            raise ApiError(403, "forbidden", why)
        if not is_ldh_label(body.network):
            raise ApiError(400, "bad_request", f"$.network: expected a network id, got {shown(body.network)}")
        secret = self._config.turn_secrets.get(body.network)
        if secret is None:
            raise ApiError(
                404, "not_found", f"this server has no secret for the TURN servers of network {body.network!r}"
            )
        wait_s = self._limit.wait_s(principal.network, time.monotonic())
        if wait_s:
            raise RateLimited(f"network {principal.network!r} requests credentials too often", wait_s)
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
