"""Log lines: one per record, whatever text a peer sends."""

import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest
from aiohttp.http_exceptions import BadStatusLine
from hypothesis import given
from hypothesis import strategies as st

from crossnet import logs
from sniproxy.streams import end_reason
from tests.support.waiting import eventually


class Reason(StrEnum):
    OK = "ok"


def record(message: str, event: object = None, **arguments: Any) -> logging.LogRecord:
    made = logging.LogRecord("sniproxy.relay.relay", logging.INFO, "", 0, message, None, None, **arguments)
    if event is not None:
        made.event = event
    return made


def as_json(message: str, event: object = None) -> dict[str, Any]:
    line = logs.JsonFormatter().format(record(message, event))
    assert "\n" not in line
    assert line.isascii()
    read = json.loads(line)
    assert isinstance(read, dict)
    return read


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = before[0]
    logger.setLevel(before[1])
    logging.captureWarnings(False)


def test_an_event_is_its_name_and_its_fields() -> None:
    line = as_json("stream", {"sni": "a.b", "bytes_up": 7, "ms_total": 1.23456, "reason": Reason.OK, "target": None})
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "stream",
        "sni": "a.b",
        "bytes_up": 7,
        "ms_total": 1.235,
        "reason": "ok",
        "target": None,
    }


def test_a_plain_message_names_its_logger() -> None:
    line = as_json("listening")
    assert (line["logger"], line["message"]) == ("sniproxy.relay.relay", "listening")


def test_an_event_field_cannot_replace_a_reserved_one() -> None:
    assert as_json("stream", {"level": "x", "event": "y"}).items() >= {
        "level": "info", "event": "stream", "level_": "x", "event_": "y",
    }.items()  # fmt: skip


def test_text_is_cut_to_200_bytes() -> None:
    assert len(as_json("stream", {"sni": "ä" * 1000})["sni"].encode()) <= 200
    assert as_json("stream", {"sni": "x" * 200})["sni"] == "x" * 200


def test_nested_values_are_bounded() -> None:
    deep: list[Any] = []
    for _ in range(50):
        deep = [deep]
    line = as_json("config", {"deep": deep, "wide": list(range(1000)), "map": {"k": "v" * 300}, "huge": 1 << 9999})
    assert len(line["wide"]) == logs.MAX_ITEMS
    assert len(line["map"]["k"].encode()) == 200


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.text(max_size=300) | st.binary(max_size=50) | st.floats() | st.integers() | st.none() | st.lists(st.text()),
        max_size=4,
    )
)
def test_every_record_is_one_line_in_both_formats(event: dict[str, object]) -> None:
    as_json("stream", event)
    made = logs.LogfmtFormatter().format(record("stream", event))
    assert len(made.splitlines()) == 1


def test_logfmt_cannot_be_forged() -> None:
    line = logs.LogfmtFormatter().format(record("stream", {"sni": 'x" reason=ok\nlevel=error', "n": 3, "plain": "a-b"}))
    assert r'sni="x\" reason=ok\nlevel=error"' in line
    assert line.endswith("n=3 plain=a-b")


def test_an_exception_stays_on_the_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        made = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, (type(error), error, None))
    line = logs.JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: first" in json.loads(line)["error"]


@pytest.mark.parametrize("style", ["json", "logfmt"])
def test_levels(root: logging.Logger, style: str) -> None:
    stream = io.StringIO()
    logs.set_up(style=style, level="warning", stream=stream)
    logging.getLogger("a").info("quiet")
    logging.getLogger("a").warning("loud")
    assert len(stream.getvalue().splitlines()) == 1
    assert "loud" in stream.getvalue()
    assert root.level == logging.WARNING


def test_a_strangers_malformed_request_is_no_error_of_ours(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", stream=stream)
    for error in (BadStatusLine("nonsense"), ValueError("a defect")):
        logging.getLogger("aiohttp.server").error("Error handling request from %s", "10.0.0.1", exc_info=error)
    (line,) = stream.getvalue().splitlines()
    assert "a defect" in json.loads(line)["error"]


def test_a_connection_that_is_closed_while_bytes_come_in_is_no_error(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", stream=stream)
    for said in ("unable to perform operation on <TCPTransport closed=True>; the handler is closed", "a defect"):
        logging.getLogger("asyncio").error("Fatal error on SSL protocol", exc_info=RuntimeError(said))
    (line,) = stream.getvalue().splitlines()
    assert "a defect" in json.loads(line)["error"]


@pytest.mark.anyio
async def test_a_flood_of_refused_streams_is_a_bounded_number_of_lines(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", refused_per_s=5, stream=stream)
    logger = logging.getLogger("crossnet.relay")
    for number in range(50):
        logger.info("stream", extra={"event": {"reason": "not_tls", "n": number}})
        logger.info("stream", extra={"event": {"reason": "ok", "ms_connect": 1.0, "n": number}})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    refused = [line for line in lines if line.get("event") == "stream" and line["reason"] == "not_tls"]
    assert 5 <= len(refused) <= 10, "of one second, or of two"
    assert len([line for line in lines if line.get("reason") == "ok"]) == 50
    count = 50 - len(refused)
    assert await left_out(stream, count) == {"stream": count}
    logger.info("stream", extra={"event": {"reason": "no_sni"}})
    assert '"no_sni"' in stream.getvalue()


@pytest.mark.anyio
@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR])
@pytest.mark.parametrize("name", ["crossnet.x", "turnreg.server.session", "aiohttp.server", "asyncio", "py.warnings"])
async def test_every_event_is_limited(root: logging.Logger, name: str, level: int) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", refused_per_s=5, stream=stream)
    for number in range(100):
        try:
            raise ValueError(number)
        except ValueError as error:
            logging.getLogger(name).log(level, "a_new_event", exc_info=error, extra={"event": {"n": number}})
    written = [line for line in stream.getvalue().splitlines() if "a_new_event" in line and logs.LEFT_OUT not in line]
    assert 5 <= len(written) <= 10
    count = 100 - len(written)
    assert (await left_out(stream, count)).total() == count


@pytest.mark.anyio
async def test_texts_that_differ_each_time_count_as_one_where_the_module_is_not_ours(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", refused_per_s=5, stream=stream)
    for number in range(100):
        logging.getLogger("asyncio").error(f"socket.accept() failed {number}")  # noqa: G004 - as asyncio does
    assert len(stream.getvalue().splitlines()) <= 11


def test_a_flood_hides_no_other_event_and_no_other_level(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", refused_per_s=5, stream=stream)
    logger = logging.getLogger("crossnet.relay")
    for _ in range(100):
        logger.info("turn_refused")
    logger.error("turn_refused")
    logger.info("started")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line for line in lines if line["level"] == "error"]
    assert [line for line in lines if line.get("message") == "started"]


def test_without_a_loop_the_next_line_triggers_the_summary(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", refused_per_s=1, stream=stream)
    limit = next(each for each in root.handlers[0].filters if isinstance(each, logs.LineLimit))
    for second in (1.0, 1.5, 1.6, 2.0):
        made = record("x")
        made.created = second
        limit.filter(made)
    (said,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (said["event"], said["lines"], said["of"]) == ("lines_left_out", 2, {"x": 2})


@pytest.mark.parametrize("probes", [False, True])
def test_health_checks_are_written_if_asked_for(root: logging.Logger, probes: bool) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", probes=probes, stream=stream)
    for name in ("stream", "connection_refused"):
        for reason in end_reason.Reason:
            logging.getLogger("crossnet.relay").info(name, extra={"event": {"reason": reason.value}})
    logging.getLogger("crossnet").info("something", extra={"event": {"reason": "probe"}})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 2 * len(end_reason.Reason) + 1 - (0 if probes else 2)
    assert {line["event"] for line in lines if line["reason"] == logs.PROBE} >= {"something"}
    assert end_reason.Reason.PROBE.value == logs.PROBE


def test_every_error_of_a_configuration_is_logged(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", refused_per_s=5, stream=stream)
    for number in range(100):
        logging.getLogger("crossnet").error("config_fault", extra={"event": {"n": number}})
    assert len(stream.getvalue().splitlines()) == 100


async def left_out(stream: io.StringIO, count: int) -> Counter[str]:
    """Wait until the log says that it left out `count` lines or more; return them by event.

    It says so in one line for each second, and a flood may go over the end of a second.
    """
    found: Counter[str] = Counter()

    def complete() -> bool:
        found.clear()
        for line in stream.getvalue().splitlines():
            if "lines_left_out" in line:
                said = json.loads(line)
                assert said["level"] == "warning"
                assert said["lines"] == sum(said["of"].values())
                found.update(said["of"])
        return found.total() >= count

    await eventually(complete)
    return found
