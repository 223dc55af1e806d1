"""The routes under /v1/records: list, read, write and delete records."""

import asyncio
import logging

import msgspec
from aiohttp import web

from discovery.api.config import DiscoveryServerConfig
from discovery.api.leases import lease_of
from discovery.api.messages import (
    ApiError,
    json_answer,
    marks,
    not_found,
    parse_if_match,
    parse_if_none_match,
    parse_key,
    parse_kind,
    read_body,
)
from discovery.api.tokens import Principal
from discovery.http.fairness import Gate
from discovery.model.mesh import AnyRecord, BadRecord, Key, Kind, check_spec, decode_spec
from discovery.store import PreconditionFailed, Store, UnknownLease

log = logging.getLogger(__name__)

LIST_PIECE = 200
"""Records that are encoded at once. That takes less than a millisecond."""

LIST_TIMEOUT_S = 300.0
"""For sending a long list, including the waits for other clients."""

MAX_CONFLICTS = 5
"""Attempts to write a record while others write it, too."""


class _PutBody(msgspec.Struct, forbid_unknown_fields=True):
    spec: msgspec.Raw
    lease: str | None = None


class RecordRoutes:
    """The routes under /v1/records."""

    def __init__(self, store: Store, config: DiscoveryServerConfig, gate: Gate) -> None:
        self._store = store
        self._config = config
        self._gate = gate
        self._sorted: tuple[object, tuple[AnyRecord, ...]] = (None, ())

    def reconfigure(self, config: DiscoveryServerConfig) -> None:
        """Use this configuration from now on."""
        self._config = config

    async def list(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        """List the records of a kind or network, or all, as this client may see them. Raises ApiError."""
        kind_text, network = request.query.get("kind"), request.query.get("network")
        kind = parse_kind(kind_text) if kind_text else None
        # Finding and sorting thousands of records takes milliseconds: lists take turns.
        await self._gate.enter(("list", principal.network), crowd=True)
        snapshot = await self._store.snapshot(kind, network or None)
        asked = (self._store.epoch, snapshot.revision, kind, network)
        if self._sorted[0] != asked:
            self._sorted = (asked, tuple(sorted(snapshot.records, key=lambda record: record.key)))
        records = self._sorted[1]
        if len(records) <= LIST_PIECE:
            found = [view for record in records if (view := principal.view(record)) is not None]
            return json_answer({"epoch": self._store.epoch, "revision": snapshot.revision, "records": found})
        return await self._list_in_pieces(request, principal, snapshot.revision, records)

    async def _list_in_pieces(
        self, request: web.Request, principal: Principal, revision: int, records: tuple[AnyRecord, ...]
    ) -> web.StreamResponse:
        """Send a long list in pieces, so that other clients get a turn in between, and nothing is encoded before it can be sent."""
        response = web.StreamResponse(headers=marks(self._store))
        response.content_type = "application/json"
        begin = {"epoch": self._store.epoch, "revision": revision}
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                await response.prepare(request)
                between = msgspec.json.encode(begin)[:-1] + b',"records":['
                for start in range(0, len(records), LIST_PIECE):
                    await self._gate.enter(("list", principal.network), crowd=True)
                    piece = records[start : start + LIST_PIECE]
                    found = [view for record in piece if (view := principal.view(record)) is not None]
                    if found:
                        await response.write(between + msgspec.json.encode(found)[1:-1])
                        between = b","
                await response.write(b"]}\n" if between == b"," else between + b"]}\n")
        except TimeoutError:
            log.info("a list that the client did not read was cut off", extra={"event": {"token": principal.name}})
            if request.transport is not None:
                request.transport.abort()
        return response

    async def get(self, request: web.Request, principal: Principal) -> web.Response:
        """Return one record as this client may see it. Raises ApiError."""
        key = parse_key(request)
        record = await self._store.get(key)
        view = principal.view(record) if record is not None else None
        if view is None:
            raise not_found(key)
        return json_answer(view, etag=view.revision)

    async def put(self, request: web.Request, principal: Principal) -> web.Response:
        """Write a record. Raises ApiError."""
        key = parse_key(request)
        _check_may_write(principal, key)
        body = await read_body(request, _PutBody)
        try:
            spec = decode_spec(key[0], body.spec)
            check_spec(key[0], key[1], spec, self._config.allow_addresses)
        except BadRecord as error:
            raise ApiError(400, "bad_record", str(error)) from None
        if body.lease is not None:
            try:
                await lease_of(self._store, principal, body.lease)
            except UnknownLease as error:
                raise ApiError(409, "no_lease", str(error)) from None
        if_match, if_none_match = parse_if_match(request), parse_if_none_match(request)
        for _ in range(MAX_CONFLICTS):
            old = await self._store.get(key)
            _check_may_write(principal, key, spec, *([old.spec] if old is not None else []))
            if old is None and await self._store.count(key[1]) >= self._config.max_records_per_network:
                limit = self._config.max_records_per_network
                raise ApiError(429, "too_many", f"network {key[1]!r} has {limit} records, which is the limit")
            # Only the record that was checked may be replaced, not one that was written since, for which there may be no right.
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
            _log_write("put", principal, key, record.revision)
            return json_answer(record, status=201 if old is None else 200, etag=record.revision)
        raise ApiError(503, "unavailable", "other clients are writing this record at the same time")

    async def delete(self, request: web.Request, principal: Principal) -> web.Response:
        """Delete a record. Raises ApiError."""
        key = parse_key(request)
        _check_may_write(principal, key)
        if_match = parse_if_match(request)
        for _ in range(MAX_CONFLICTS):
            old = await self._store.get(key)
            if old is None and key[0] is Kind.SERVICE:
                raise not_found(key)  # whether it may be deleted depends on its name
            pin = if_match
            if old is not None:
                _check_may_write(principal, key, old.spec)
                pin = if_match if if_match is not None else old.revision
            try:
                deletion = await self._store.delete(key, if_match=pin)
            except PreconditionFailed as error:
                if if_match is not None:
                    raise ApiError(412, "precondition_failed", str(error)) from None
                continue
            if deletion is None:
                raise not_found(key)
            _log_write("delete", principal, key, deletion.revision)
            return json_answer({"revision": deletion.revision})
        raise ApiError(503, "unavailable", "other clients are writing this record at the same time")


def _check_may_write(principal: Principal, key: Key, *specs: object) -> None:
    why = principal.refusal_to_write(key, specs)  # type: ignore[arg-type]
    if why is not None:
        raise ApiError(403, "forbidden", why)


def _log_write(what: str, principal: Principal, key: Key, revision: int) -> None:
    if log.isEnabledFor(logging.DEBUG):
        kind, network, record_id = key
        event = {"token": principal.name, "kind": kind, "network": network, "id": record_id, "revision": revision}
        log.debug("%s", what, extra={"event": event})
