"""What the process is around the roles: log, limits, event loop, signals, exit code.

The first SIGTERM or SIGINT drains, a second one ends at once; SIGHUP has the configuration read anew.
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
"""Objects more than at the last time, before Python looks for cycles among them: what 5,000 new streams have. By default it is 700,
and thousands of streams that come and go make it walk over all that are there several times a second, for up to 60 ms each time in
which nothing else happens. It finds nothing of streams that were carried: they leave no cycles. Those that a gateway could not
deliver leave a hundred objects each, so that it looks after two thousand of them."""


def run(config: Config, chosen: Sequence[str], path: Path | None = None) -> int:
    """Run these roles until a signal ends them; return the exit code. `path` is read anew when it changes and on SIGHUP."""
    logs.set_up(style=config.log.format, level=config.log.level, refused_per_s=config.log.refused_per_second)
    limit = raise_open_files()
    spare_collections()
    log.info("crossnet", extra={"event": {"version": version("crossnet"), "roles": chosen, "open_files": limit}})
    log.info("config", extra={"event": {"config": encode(Config, config)}})
    for warning in warnings(config):
        log.warning("%s", warning)
    # The runner leaves SIGINT alone when a handler of ours is there; ours drains as SIGTERM does.
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
    """Yield the exceptions that a group holds, however deep."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def raise_open_files() -> int:
    """Let this process have as many descriptors as it may; a stream takes two. Return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return hard
    return soft


def spare_collections() -> None:
    """Have garbage looked for when there may be some, and never among what is there from the start."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AT, *gc.get_threshold()[1:])
