"""The process around the roles: log, limits, event loop, signals, exit code.

The first SIGTERM or SIGINT drains, a second one stops at once; SIGHUP reloads the configuration.
"""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import uvloop

from crossnet import logs
from crossnet.app.app import App, StartError
from crossnet.config.file import warnings
from crossnet.config.schema import encode
from crossnet.config.sections import Config

log = logging.getLogger("crossnet")

FAILED = 1

COLLECT_AT = 200_000
"""Threshold of the garbage collector, in new objects: as many as 5,000 new streams have. With Python's default of 700, thousands of
streams that come and go make it traverse all objects several times a second, for up to 60 ms each, in which nothing else runs.
Streams that were carried leave no cycles, so it finds nothing of them. Those that a gateway could not deliver leave a hundred
objects each, so that it runs after two thousand of them."""


def run(config: Config, chosen: Sequence[str], path: Path | None = None) -> int:
    """Run these roles until a signal ends them; return the exit code. `path` is reloaded when it changes, and on SIGHUP."""
    logs.set_up(
        style=config.log.format,
        level=config.log.level,
        refused_per_s=config.log.refused_per_second,
        probes=config.log.probes,
    )
    limit = raise_open_files()
    spare_collections()
    log.info("crossnet", extra={"event": {"version": version("crossnet"), "roles": chosen, "open_files": limit}})
    log.info("config", extra={"event": {"config": encode(Config, config)}})
    for warning in warnings(config):
        log.warning("%s", warning)
    # asyncio.Runner does not handle SIGINT if there is another handler; ours drains, as for SIGTERM.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(config, chosen, path))


async def _run(config: Config, chosen: Sequence[str], path: Path | None) -> int:
    app = App(config, chosen, path)
    received: list[int] = []

    def take(number: int) -> None:
        received.append(number)
        app.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, take, number)
    loop.add_signal_handler(signal.SIGHUP, app.reloader.ask if app.reloader is not None else lambda: None)
    failed = False
    try:
        await app.serve()
    except* StartError as group:
        failed = True
        for error in leaves(group):
            log.error("cannot_start", extra={"event": {"detail": str(error)}})
    except* Exception as group:
        failed = True
        for error in leaves(group):
            log.error("died", exc_info=error)
    if failed or not (received or app.handed_over):
        return FAILED
    return 128 + received[0] if received else 0


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group, also in nested ones."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def raise_open_files() -> int:
    """Raise the limit of open files to the hard limit, since a stream takes two. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return hard
    return soft


def spare_collections() -> None:
    """Make garbage collection rare, and exclude all objects that exist so far."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AT, *gc.get_threshold()[1:])
