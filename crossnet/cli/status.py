"""`crossnet status`: the state of a running process, as tables."""

import contextlib
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

REQUEST_TIMEOUT_S = 5.0
WATCH_EVERY_S = 1.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_STREAMS_SHOWN = 50
MAX_CELL = 60

STREAM_COLUMNS = (
    ("stream", "stream"),
    ("client", "client"),
    ("sni", "name"),
    ("candidate", "candidate"),
    ("endpoint", "endpoint"),
    ("state", "state"),
    ("bytes_up", "up"),
    ("bytes_down", "down"),
    ("ms_total", "ms"),
)
NUMBERS = frozenset({"up", "down", "ms"})

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


class StatusError(Exception):
    """The process does not answer; the text says why."""


def status_command(admin: str, *, watch: bool, as_json: bool) -> int:
    """Print the state of the process whose admin server is at `HOST:PORT`; if `watch`, repeat once a second."""
    try:
        if as_json:
            print(json.dumps({"status": fetch(admin, "/status"), "streams": fetch(admin, "/streams")}))
            return 0
        if watch and sys.stdout.isatty() and (live := _live()) is not None:
            return live(admin)
        while True:
            print("\n".join(plain(*read(admin))), flush=True)
            if not watch:
                return 0
            time.sleep(WATCH_EVERY_S)
            print()
    except StatusError as error:
        print(f"crossnet status: {error}", file=sys.stderr)
        return 1


def fetch(admin: str, path: str) -> Any:
    """Request a page of the admin server. Raises StatusError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{admin}{path}", timeout=REQUEST_TIMEOUT_S) as response:
            return json.loads(response.read(MAX_ANSWER_BYTES))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StatusError(
            f"no answer from http://{admin}{path}: {reason} (is it running? admin: in its file)"
        ) from error


def read(admin: str) -> tuple[list[str], list[Table]]:
    """Request the state of a process; return lines and tables. Raises StatusError."""
    return report(fetch(admin, "/status"), fetch(admin, "/streams"))


def report(status: dict[str, Any], streams: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[Table]]:
    """Convert the pages /status and /streams to lines and tables."""
    return _lines(status), list(_tables(status, streams))


def plain(lines: Sequence[str], tables: Sequence[Table]) -> Iterator[str]:
    """Yield lines and tables as plain text."""
    yield from lines
    for title, columns, rows in tables:
        yield ""
        yield title
        widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
        for row in (columns, *rows):
            cells = [
                cell.rjust(width) if name in NUMBERS else cell.ljust(width)
                for cell, width, name in zip(row, widths, columns, strict=True)
            ]
            yield ("  " + "  ".join(cells)).rstrip()


def _lines(status: dict[str, Any]) -> list[str]:
    waiting = status["waiting_for"]
    discovery = status["discovery"]
    listening = ", ".join(f"{role} {' '.join(addresses)}" for role, addresses in status["listening"].items())
    view = f"{discovery['records']} records of {len(discovery['networks'])} networks, revision {discovery['revision']}"
    if discovery.get("connected") is False:
        view += f", not confirmed for {discovery.get('age_s') or 0:.0f} s"
    return [
        f"network {status['network']}: {', '.join(status['roles'])}; crossnet {status['version']}, up {status['seconds']:.0f} s",
        f"  {'ready' if not waiting else 'waits for ' + ', '.join(waiting)}",
        f"  listens: {listening}",
        f"  discovery: {view if discovery['synced'] else 'not heard from yet'}",
    ]


def _tables(status: dict[str, Any], streams: dict[str, list[dict[str, Any]]]) -> Iterator[Table]:
    if status["registrations"]:
        rows = [
            [
                f"{line['via']}/{line.get('turn') or '-'}",
                str(line["state"]),
                ":".join(map(str, line.get("relayed") or ())),
                " ".join(line.get("permissions") or ()),
                _cell((line.get("last_error") or {}).get("detail")),
            ]
            for line in status["registrations"]
        ]
        yield "registrations", ["TURN server", "state", "relayed address", "permissions", "last error"], rows
    if status.get("relay_sources"):
        columns = ["TURN server", "sees the relay as", "how known", "why"]
        rows = [
            [str(line["turn"]), " ".join(line["addresses"]), str(line["state"]), _cell(line["detail"])]
            for line in status["relay_sources"]
        ]
        yield "relay's addresses", columns, rows
    if failing := [(role, line) for role in ("relay", "gateway") for line in status.get(f"{role}_endpoints", ())]:
        columns = ["of", "endpoint", "failures", "left out for s", "last error"]
        rows = [
            [role, str(line["endpoint"]), str(line["failures"]), _cell(line["left_out_s"]), _cell(line["why"])]
            for role, line in failing
        ]
        yield "endpoints of services that fail", columns, rows
    if status.get("upstreams"):
        columns = ["upstream", "random case", "cookies", "answers"]
        rows = [
            [
                _cell(line["upstream"]),
                _cell(line["random_case"]),
                "yes" if line["cookies"] else "no",
                "a loop" if line["loop"] else "yes" if line["answers"] else "no",
            ]
            for line in status["upstreams"]
        ]
        yield "dns", columns, rows
    for role, open_streams in streams.items():
        used = [(field, name) for field, name in STREAM_COLUMNS if any(field in row for row in open_streams)]
        rows = [[_cell(row.get(field)) for field, _ in used] for row in open_streams[-MAX_STREAMS_SHOWN:]]
        left = f" (the last {MAX_STREAMS_SHOWN})" if len(open_streams) > MAX_STREAMS_SHOWN else ""
        yield f"{role}: {len(open_streams)} streams{left}", [name for _, name in used], rows


def _cell(value: object) -> str:
    """Return a value for a table: printable and on one line, since it may come from a peer."""
    text = "" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _live() -> Callable[[str], int] | None:
    """Return a view that redraws itself, or None if rich is not installed."""
    try:
        from rich.live import Live
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return None
    from rich.console import Group

    def view(admin: str) -> Group:
        lines, tables = read(admin)
        parts: list[Any] = [Text("\n".join(lines))]
        for title, columns, rows in tables:
            table = RichTable(title=title, title_justify="left", box=None)
            for column in columns:
                table.add_column(column, justify="right" if column in NUMBERS else "left", no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, row))
            parts.append(table)
        return Group(*parts)

    def watch(admin: str) -> int:
        with contextlib.suppress(KeyboardInterrupt), Live(view(admin), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(WATCH_EVERY_S)
                live.update(view(admin), refresh=True)
        return 0

    return watch
