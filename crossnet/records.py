"""`crossnet records`: read and write records of a discovery server, one request a command."""

import json
import ssl
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from crossnet.sections import Config
from discovery.static import load_mesh

REQUEST_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""A mesh of ten thousand services has some 2 MB."""

COLUMNS = ("kind", "network", "id", "revision", "lease")


class RecordsError(Exception):
    """The server refused, or none answered; the text says which."""


@dataclass(frozen=True, slots=True)
class Server:
    """The discovery servers of a configuration, asked in their order until one answers."""

    urls: tuple[str, ...]
    token: str | None
    ca: Path | None

    @classmethod
    def of(cls, config: Config) -> "Server":
        """Return those that a configuration names."""
        return cls(
            tuple(source for source in config.discovery if isinstance(source, str)),
            config.token.text if config.token else None,
            config.discovery_tls.ca if config.discovery_tls else None,
        )

    def request(self, method: str, path: str, body: object = None) -> Any:
        """Send one request and return the answer. Raises RecordsError."""
        if not self.urls:
            raise RecordsError("the configuration names no discovery server; a static mesh file is written by hand")
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.token}"} if self.token else {}
        )
        tls = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        # No proxy of the environment: discovery is ours, and its token is for nobody else.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
        away = []
        for url in self.urls:
            request = urllib.request.Request(url + path, data=data, method=method, headers=headers)  # noqa: S310 - checked: http or https
            try:
                with opener.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                    return json.loads(response.read(MAX_ANSWER_BYTES) or b"null")
            except urllib.error.HTTPError as error:
                raise RecordsError(_refusal(error)) from error
            except (OSError, ValueError) as error:
                away.append(f"{url}: {getattr(error, 'reason', error)}")
        raise RecordsError("; ".join(away))


def list_records(config: Config, kind: str | None, network: str | None, as_json: bool) -> int:
    """Print records, one a line."""
    if config.static_mesh is not None:
        found = msgspec.to_builtins(list(load_mesh(config.static_mesh, config.dialled)))
        records = [
            record for record in found if kind in (None, record["kind"]) and network in (None, record["network"])
        ]
    else:
        asked = {name: value for name, value in (("kind", kind), ("network", network)) if value is not None}
        records = Server.of(config).request("GET", f"/v1/records?{urlencode(asked)}")["records"]
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
    print(json.dumps(Server.of(config).request("GET", _path(config, kind, network, record_id)), indent=2))
    return 0


def put_record(config: Config, kind: str, network: str | None, record_id: str, spec_text: str) -> int:
    """Write one record, whose spec is JSON, or `-` for standard input; print it as the server has it now."""
    text = sys.stdin.read() if spec_text == "-" else spec_text
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise RecordsError(f"the spec is no JSON: {error}") from error
    record = Server.of(config).request("PUT", _path(config, kind, network, record_id), {"spec": spec})
    print(json.dumps(record))
    return 0


def delete_record(config: Config, kind: str, network: str | None, record_id: str) -> int:
    """Delete one record."""
    Server.of(config).request("DELETE", _path(config, kind, network, record_id))
    return 0


def _path(config: Config, kind: str, network: str | None, record_id: str) -> str:
    return "/v1/records/" + "/".join(quote(part, safe="") for part in (kind, network or config.network, record_id))


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read(MAX_ANSWER_BYTES))
        return f"{said['error']}: {said['detail']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"HTTP {error.code} {error.reason}"
