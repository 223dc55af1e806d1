"""The log: one JSON object or one logfmt line per record, on stderr.

A structured event is `log.info("stream", extra={"event": {...fields...}})`, where the message is the event's name. Any field may
contain text from a peer, so every text is truncated and escaped, and no name can forge a line or a field.
"""

import asyncio
import json
import logging
import math
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, TextIO

from aiohttp.http_exceptions import HttpProcessingError

log = logging.getLogger("crossnet")

MAX_TEXT_BYTES = 200
"""Of one text in an event. A DNS name has at most 253 bytes, and nobody reads more."""

PROBED = frozenset({"stream", "connection_refused"})
PROBE = "probe"
"""Events and their reason (`sniproxy.streams.end_reason`) that health checks cause."""

LEFT_OUT = "lines_left_out"
OURS = frozenset({"crossnet", "discovery", "sniproxy", "turnreg", "dnsgw"})

MAX_LIMITED_NAMES = 500
"""Events that are counted separately in one second; there are some 150."""

MAX_NAMES_TOLD = 10
MAX_MESSAGE_BYTES = 2000
MAX_TRACEBACK_BYTES = 8000
MAX_NAME = 64
MAX_ITEMS = 100
MAX_DEPTH = 6
RESERVED = frozenset({"time", "level", "event", "logger", "message", "error"})

# Reused, since json.dumps with options makes an encoder for each call, and a log line is a tenth of a short stream's cost.
_ENCODE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

_BARE = re.compile(r"[A-Za-z0-9_.:/@+*-]+")


def set_up(
    *, style: str, level: str, refused_per_s: int = 0, probes: bool = True, stream: TextIO | None = None
) -> None:
    """Configure the process's log.

    Args:
        style: `json` or `logfmt`.
        level: lowest level that is written.
        refused_per_s: limit of lines per second for each event (see `LineLimit`); 0: no limit.
        probes: whether to write a line for each health check, too: a connection that ended without a byte.
        stream: where lines go; None: stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    if not probes:
        handler.addFilter(_is_no_probe)
    if refused_per_s:
        handler.addFilter(LineLimit(refused_per_s))
    handler.setFormatter(JsonFormatter() if style == "json" else LogfmtFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Do not collect source location, thread and process, which no line contains (logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(True)
    # Without these, every request to the admin server would be a line, and asyncio would log its selector.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(max(logging.INFO, root.level))
    logging.getLogger("aiohttp.server").filters[:] = [_is_ours]
    logging.getLogger("asyncio").filters[:] = [_is_fatal]


def _is_ours(record: logging.LogRecord) -> bool:
    """Drop tracebacks of malformed requests, with which anybody could fill the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Drop the line of a health check."""
    event = getattr(record, "event", None)
    return not (record.msg in PROBED and isinstance(event, Mapping) and event.get("reason") == PROBE)


def _is_fatal(record: logging.LogRecord) -> bool:
    """Drop an error that uvloop reports when TLS data arrives just after we have closed the connection."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, RuntimeError) and str(error).endswith("the handler is closed"))


class LineLimit(logging.Filter):
    """Limits the lines per second of each event, and logs once a second how many were left out.

    It applies to all events, so that none that an outsider can cause is overlooked. Always written are: streams that were open
    (audits count them), errors of a configuration, and `debug`, which an operator has asked for.
    """

    def __init__(self, limit_per_s: int) -> None:
        super().__init__()
        self._limit = limit_per_s
        self._second = 0
        self._lines: Counter[Hashable] = Counter()
        self._left_out: Counter[str] = Counter()
        self._told_later = False
        self._lock = threading.Lock()  # threads log, too

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the line."""
        if record.levelno < logging.INFO or _always_written(record):
            return True
        due: Counter[str] | None = None
        with self._lock:
            second = int(record.created)
            if second != self._second:
                self._second = second
                self._lines.clear()
                due = self._take_left_out()
            # By name and level, so that a flood of one event does not suppress errors.
            name = _line_name(record)
            key: Hashable = (name, record.levelno)
            if key not in self._lines and len(self._lines) >= MAX_LIMITED_NAMES:
                name = key = "other"
            self._lines[key] += 1
            written = self._lines[key] <= self._limit
            if not written:
                self._left_out[name] += 1
                self._tell_later()
        if due:
            self._tell(due)
        return written

    def _tell_later(self) -> None:
        """Schedule the summary in a second; without a running loop, the next line triggers it."""
        if self._told_later:
            return
        try:
            asyncio.get_running_loop().call_later(1.0, self._tell_now)
            self._told_later = True
        except RuntimeError:
            pass

    def _tell_now(self) -> None:
        with self._lock:
            due = self._take_left_out()
            self._told_later = False
        if due:
            self._tell(due)

    def _take_left_out(self) -> Counter[str]:
        left_out, self._left_out = self._left_out, Counter()
        return left_out

    def _tell(self, left_out: Counter[str]) -> None:
        event = {
            "lines": left_out.total(),
            "of": dict(left_out.most_common(MAX_NAMES_TOLD)),
            "limit": f"log.refused_per_second: {self._limit}",
            "hint": "metrics count all",
        }
        log.warning(LEFT_OUT, extra={"event": event})


def _always_written(record: logging.LogRecord) -> bool:
    """Whether the number of such lines is bounded elsewhere."""
    if record.msg in (LEFT_OUT, "config_fault", "turn_stream"):
        return True
    event = getattr(record, "event", None)
    return record.msg == "stream" and isinstance(event, Mapping) and "ms_connect" in event


def _line_name(record: logging.LogRecord) -> str:
    """Return the name that a line is counted under: its event, or its module if that is not ours, whose texts contain values."""
    top = record.name.partition(".")[0]
    return str(record.msg)[:MAX_NAME] if top in OURS else record.name[:MAX_NAME]


class JsonFormatter(logging.Formatter):
    """One JSON object per line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        return _ENCODE(_fields(record))


class LogfmtFormatter(logging.Formatter):
    """`key=value` pairs; a value that is not a single plain word is written as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={_logfmt(value)}" for name, value in _fields(record).items())


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"time": _time(record.created), "level": record.levelname.lower()}
    event = getattr(record, "event", None)
    message = cut(record.getMessage(), MAX_MESSAGE_BYTES)
    if isinstance(event, Mapping):
        fields["event"] = message
        for name, value in event.items():
            fields[_field_name(str(name))] = _plain(value, 0)
    else:
        fields |= {"logger": record.name, "message": message}
    if record.exc_info:
        fields["error"] = cut(logging.Formatter().formatException(record.exc_info), MAX_TRACEBACK_BYTES)
    return fields


def cut(text: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Truncate a text to at most `limit` bytes of UTF-8, with an ellipsis at the end."""
    if len(text) * 4 <= limit:
        return text
    data = text.encode(errors="backslashreplace")
    return text if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "…"


@lru_cache(maxsize=1024)
def _field_name(name: str) -> str:
    """Return a key that is one word in both formats and differs from the reserved ones."""
    word = re.sub(r"[^A-Za-z0-9_.-]", "_", name[:MAX_NAME]) or "_"
    return f"{word}_" if word in RESERVED else word


def _plain(value: object, depth: int) -> Any:
    """Convert any value to what JSON supports, with texts truncated."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # before other types: a StrEnum is a str, too
        return cut(str(value))
    if isinstance(value, int):
        return value if value.bit_length() < 64 else cut(hex(value))
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray):
        return cut(bytes(value[:MAX_TEXT_BYTES]).decode(errors="backslashreplace"))
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {cut(str(name)): _plain(item, depth + 1) for name, item in list(value.items())[:MAX_ITEMS]}
    if depth < MAX_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return cut(str(value))


def _logfmt(value: object) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value):
        return value
    if isinstance(value, dict | list):
        value = json.dumps(value, separators=(",", ":"))
    return json.dumps(value)


def _time(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
