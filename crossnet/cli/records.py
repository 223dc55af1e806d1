"""`crossnet records`: read and write records of a discovery server."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from crossnet.config.sections import Config
from discovery.client.mesh_file import format_mesh, load_mesh
from discovery.client.servers import RequestRefused, Servers, ServerUnavailable
from discovery.files.yaml_file import BadFile
from discovery.model.mesh import Kind, decode_record

T = TypeVar("T")

LEASED_KINDS = frozenset({Kind.RELAY, Kind.GATEWAY, Kind.TURN, Kind.ALLOCATION})
"""Kinds of records that running processes write, with leases."""

MAX_NAMED = 5
COLUMNS = ("kind", "network", "id", "revision", "lease")


class RecordsError(Exception):
    """A server has refused, or none has answered; the text says which."""


def request(config: Config, method: str, path: str, body: object = None) -> dict[str, Any]:
    """Send a request to the discovery servers of a configuration, in order, until one answers. Raises RecordsError."""

    async def ask(servers: Servers) -> dict[str, Any]:
        return await servers.anywhere(method, path, body)

    return _with_servers(config, ask)


def _with_servers(config: Config, ask: Callable[[Servers], Awaitable[T]]) -> T:
    """Call `ask` with the discovery servers of a configuration. Raises RecordsError."""
    if not config.discovery_urls:
        raise RecordsError("the configuration names no discovery server; a static mesh file is written by hand")

    async def speak() -> T:
        servers = Servers.at(
            config.discovery_urls,
            token=config.token.text if config.token else None,
            ca_file=config.discovery_tls.ca if config.discovery_tls else None,
            cert_file=config.discovery_tls.cert if config.discovery_tls else None,
            key_file=config.discovery_tls.key if config.discovery_tls else None,
            insecure=config.insecure,
        )
        async with servers.connected():
            return await ask(servers)

    try:
        return asyncio.run(speak())
    except (ServerUnavailable, RequestRefused, OSError, ValueError) as error:
        raise RecordsError(str(error)) from error


def list_records(config: Config, kind: str | None, network: str | None, as_json: bool) -> int:
    """Print records, one per line."""
    if config.static_mesh is not None and not config.discovery_urls:
        found = msgspec.to_builtins(list(load_mesh(config.static_mesh, config.dialled)))
        records = [
            record for record in found if kind in (None, record["kind"]) and network in (None, record["network"])
        ]
    else:
        asked = {name: value for name, value in (("kind", kind), ("network", network)) if value is not None}
        records = request(config, "GET", f"/v1/records?{urlencode(asked)}")["records"]
    if as_json:
        for record in records:
            print(json.dumps(record))
        return 0
    rows = [COLUMNS, *(tuple(str(record.get(column) or "-") for column in COLUMNS) for record in records)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    specs = ["spec", *(json.dumps(record["spec"], separators=(",", ":")) for record in records)]
    for row, spec in zip(rows, specs, strict=True):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), spec]))
    return 0


def get_record(config: Config, kind: str, network: str | None, record_id: str) -> int:
    """Print one record as JSON."""
    print(json.dumps(request(config, "GET", _path(config, kind, network, record_id)), indent=2))
    return 0


def put_record(config: Config, kind: str, network: str | None, record_id: str, spec_text: str) -> int:
    """Write one record and print the server's answer. `spec_text` is JSON, or `-` for standard input."""
    text = sys.stdin.read() if spec_text == "-" else spec_text
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise RecordsError(f"the spec is not JSON: {error}") from error
    record = request(config, "PUT", _path(config, kind, network, record_id), {"spec": spec})
    print(json.dumps(record))
    return 0


def delete_record(config: Config, kind: str, network: str | None, record_id: str) -> int:
    """Delete one record."""
    request(config, "DELETE", _path(config, kind, network, record_id))
    return 0


def export_records(config: Config, network: str | None, leased: bool) -> int:
    """Print the server's records as a mesh file; those with a lease only if `leased`."""
    asked = f"?{urlencode({'network': network})}" if network is not None else ""
    found = request(config, "GET", f"/v1/records{asked}")["records"]
    records, left_out = [], Counter[str]()
    for item in found:
        record = decode_record(json.dumps(item).encode())
        hidden = record.kind is Kind.SERVICE and not any(record.spec.ports.values())
        if record.kind in (Kind.TURN, Kind.ALLOCATION):
            left_out[f"{record.kind} records, which need a server"] += 1
        elif hidden:
            left_out["services whose endpoints this token may not see"] += 1
        elif record.network != config.network and (record.kind in LEASED_KINDS or record.lease is not None):
            # A token of one network cannot see the leases of others, so the kind decides.
            left_out["records that processes of other networks write"] += 1
        elif record.lease is not None and not leased:
            left_out["records with a lease (--leased takes them)"] += 1
        else:
            records.append(record)
    sys.stdout.write(format_mesh(records))
    for what, count in sorted(left_out.items()):
        print(f"left out: {count} {what}", file=sys.stderr)
    return 0


def import_records(config: Config, path: Path, leased: bool = False) -> int:
    """Write all records of a mesh file to the server, without a lease, and print those that are new or changed.

    If it has records of kinds that running processes write, nothing is written unless `leased`.
    """
    try:
        mesh = load_mesh(path, config.dialled)
    except BadFile as error:
        raise RecordsError(str(error)) from error

    theirs = [record for record in mesh if record.kind in LEASED_KINDS]
    if theirs and not leased:
        named = ", ".join(f"{record.kind}/{record.network}/{record.id}" for record in theirs[:MAX_NAMED])
        more = f" and {len(theirs) - MAX_NAMED} more" if len(theirs) > MAX_NAMED else ""
        raise RecordsError(
            f"{path}: {named}{more}: running processes write such records, and these would stay when nobody runs; "
            "nothing is imported (--leased imports them)"
        )

    async def write(servers: Servers) -> int:
        there = {
            (item["kind"], item["network"], item["id"]): item
            for item in (await servers.anywhere("GET", "/v1/records"))["records"]
        }
        refused = 0
        for record in mesh:
            spec = msgspec.to_builtins(record.spec)
            known = there.get((str(record.kind), record.network, record.id))
            if known is not None and known["spec"] == spec and known["lease"] is None:
                continue
            name = f"{record.kind}/{record.network}/{record.id}"
            try:
                await servers.anywhere("PUT", f"/v1/records/{name}", {"spec": spec})
            except RequestRefused as error:
                if record.kind is Kind.NETWORK and error.status == 403:
                    continue  # a file must declare its networks; records in one show that it exists
                refused += 1
                print(f"crossnet records: {name}: {error}", file=sys.stderr)
            else:
                print(f"{'changed' if known is not None else 'new'}  {name}")
        return refused

    return 1 if _with_servers(config, write) else 0


def _path(config: Config, kind: str, network: str | None, record_id: str) -> str:
    return "/v1/records/" + "/".join(quote(part, safe="") for part in (kind, network or config.network, record_id))
