"""The routes under /v1/leases: grant, renew and revoke leases."""

import msgspec
from aiohttp import web

from discovery.api.config import DiscoveryServerConfig
from discovery.api.messages import ApiError, json_answer, read_body
from discovery.api.tokens import Principal
from discovery.model.validation import shown
from discovery.store import Lease, Store, UnknownLease

MAX_LEASE_S = 3600


class _LeaseBody(msgspec.Struct, forbid_unknown_fields=True):
    ttl_s: int = 10


class LeaseRoutes:
    """The routes under /v1/leases."""

    def __init__(self, store: Store, config: DiscoveryServerConfig) -> None:
        self._store = store
        self._config = config

    def reconfigure(self, config: DiscoveryServerConfig) -> None:
        """Use this configuration from now on."""
        self._config = config

    async def grant(self, request: web.Request, principal: Principal) -> web.Response:
        """Grant a lease to this token. Raises ApiError."""
        body = await read_body(request, _LeaseBody)
        if not 1 <= body.ttl_s <= MAX_LEASE_S:
            raise ApiError(400, "bad_request", f"$.ttl_s: expected 1 to {MAX_LEASE_S} seconds, got {shown(body.ttl_s)}")
        if len(await self._store.leases(principal.owner)) >= self._config.max_leases_per_token:
            raise ApiError(429, "too_many", f"the token has {self._config.max_leases_per_token} leases, the limit")
        lease = await self._store.grant(body.ttl_s, principal.owner)
        return json_answer({"id": lease.id, "ttl_s": lease.ttl_s}, status=201)

    async def renew(self, request: web.Request, principal: Principal) -> web.Response:
        """Reset a lease of this token to its full TTL. Raises ApiError."""
        try:
            lease = await lease_of(self._store, principal, request.match_info["id"])
            await self._store.renew(lease.id)
        except UnknownLease as error:
            raise ApiError(410, "lease_gone", str(error)) from None
        return json_answer({"id": lease.id, "ttl_s": lease.ttl_s})

    async def revoke(self, request: web.Request, principal: Principal) -> web.Response:
        """End a lease of this token and delete its records. Raises ApiError."""
        try:
            lease = await lease_of(self._store, principal, request.match_info["id"])
            deletions = await self._store.revoke(lease.id)
        except UnknownLease as error:
            raise ApiError(410, "lease_gone", str(error)) from None
        return json_answer({"withdrawn": len(deletions), "revision": self._store.revision})


async def lease_of(store: Store, principal: Principal, lease_id: str) -> Lease:
    """Return a lease of this token. Raises UnknownLease, and ApiError if it belongs to another token."""
    lease = await store.lease(lease_id[:64])
    if lease is None:
        raise UnknownLease(lease_id[:64])
    if lease.owner != principal.owner:
        raise ApiError(403, "forbidden", "the lease belongs to another token")
    return lease
