"""`crossnet records`: read and write records of a discovery server, one request a command."""

import asyncio
import json
import sys
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from crossnet.sections import Config
from discovery.servers import Away, Refused, Servers
from discovery.static import load_mesh

COLUMNS = ("kind", "network", "id", "revision", "lease")


class RecordsError(Exception):
    """The server refused, or none answered; the text says which."""


def request(config: Config, method: str, path: str, body: object = None) -> dict[str, Any]:
    """Ask the discovery servers of a configuration, in their order until one answers. Raises RecordsError."""
    urls = [source for source in config.discovery if isinstance(source, str)]
    if not urls:
        raise RecordsError("the configuration names no discovery server; a static mesh file is written by hand")

    async def ask() -> dict[str, Any]:
        servers = Servers.at(
            urls,
            token=config.token.text if config.token else None,
            ca_file=config.discovery_tls.ca if config.discovery_tls else None,
            cert_file=config.discovery_tls.cert if config.discovery_tls else None,
            key_file=config.discovery_tls.key if config.discovery_tls else None,
            insecure=config.insecure,
        )
        async with servers.connected():
            return await servers.anywhere(method, path, body)

    try:
        return asyncio.run(ask())
    except (Away, Refused, OSError, ValueError) as error:
        raise RecordsError(str(error)) from error


def list_records(config: Config, kind: str | None, network: str | None, as_json: bool) -> int:
    """Print records, one a line."""
    if config.static_mesh is not None:
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
    """Write one record, whose spec is JSON, or `-` for standard input; print it as the server has it now."""
    text = sys.stdin.read() if spec_text == "-" else spec_text
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise RecordsError(f"the spec is no JSON: {error}") from error
    record = request(config, "PUT", _path(config, kind, network, record_id), {"spec": spec})
    print(json.dumps(record))
    return 0


def delete_record(config: Config, kind: str, network: str | None, record_id: str) -> int:
    """Delete one record."""
    request(config, "DELETE", _path(config, kind, network, record_id))
    return 0


def _path(config: Config, kind: str, network: str | None, record_id: str) -> str:
    return "/v1/records/" + "/".join(quote(part, safe="") for part in (kind, network or config.network, record_id))
