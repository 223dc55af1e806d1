"""Reloads the configuration of a running process: when the file or one of its secrets changes, or on SIGHUP. All or nothing.

Settings for new streams change at once: rules, allow-lists, imports, signing keys, credentials, limits, timeouts, log. What a role
has bound or published stays until a restart, and that is logged. A file with an error changes nothing, and all of its errors are
logged. If an unexpected error occurs while a file is applied, the former configuration is restored as a whole.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Info

from crossnet.config.file import ConfigError, load
from crossnet.config.file_values import Certificates, Secret
from crossnet.config.schema import faults_of, fields_of, is_live
from crossnet.config.sections import Config
from discovery.files.fingerprint import Fingerprint, fingerprint

log = logging.getLogger("crossnet")

WATCH_INTERVAL_S = 1.0
"""A stat of each file per second costs next to nothing. A changed file is read once it has not changed for this long: a file that
an editor is still writing may be cut short and yet valid."""

RETRY_S = 10.0
"""A file with errors is read again after this time: a missing key file may have appeared."""

Stamps: TypeAlias = dict[Path, Fingerprint | None]


@dataclass(frozen=True, slots=True)
class Change:
    """The effect of a new file."""

    config: Config
    """The old configuration with all changes that need no restart."""
    applied: tuple[str, ...]
    """Paths that these changes concern."""
    restart: tuple[str, ...]
    """Paths whose changes wait for a restart."""


def change(old: Config, new: Config) -> Change:
    """Determine which changes of a new file can be applied to a running process.

    If they would contradict a setting that waits for a restart, all changes wait.
    """
    applied: list[str] = []
    restart: list[str] = []
    config: Config = _merged(old, new, "", applied, restart)
    if applied and restart and any(faults_of(config)):
        return Change(old, (), (*applied, *restart))
    return Change(config, tuple(applied), tuple(restart))


def _merged(old: Any, new: Any, section: str, applied: list[str], restart: list[str]) -> Any:
    changes = {}
    for name, field, kind in fields_of(type(old)):
        before, after = getattr(old, field.name), getattr(new, field.name)
        path = f"{section}.{name}".removeprefix(".")
        if before == after:
            continue
        if is_live(kind):
            changes[field.name] = after
            applied.append(path)
        elif type(before) is type(after) and _holds_live(before):
            changes[field.name] = _merged(before, after, path, applied, restart)
        else:
            restart.append(path)
    return dataclasses.replace(old, **changes)


def _holds_live(section: object) -> bool:
    return dataclasses.is_dataclass(section) and any(is_live(kind) for _, _, kind in fields_of(type(section)))


def files(value: object) -> Iterator[Path]:
    """Yield the files whose contents are part of a configuration: secrets and certificates."""
    if isinstance(value, Secret | Certificates):
        yield value.path
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from files(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from files(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from files(item)


class Refused(Exception):
    """A valid configuration that this process cannot apply; the text says where and why."""


class Reloader:
    """Watches the configuration file of a process. `run` it; `ask` reads at once."""

    def __init__(
        self, path: Path, config: Config, apply: Callable[[Config], None], registry: CollectorRegistry
    ) -> None:
        """Watch a file.

        Args:
            path: the file.
            config: what was read from it.
            apply: changes the process to another configuration. Raises Refused for one that it cannot apply. If it raises anything,
                nothing has changed.
            registry: where the metrics are registered.
        """
        self._path = path
        self._config = config
        self._apply = apply
        self._asked = asyncio.Event()
        self._reloads = Counter(
            "crossnet_config_reloads", "Configurations that were read anew.", ["result"], registry=registry
        )
        for result in ("applied", "unchanged", "refused"):
            self._reloads.labels(result)
        self._good = Gauge(
            "crossnet_config_last_reload_successful", "0 while the file on disk has faults.", registry=registry
        )
        self._waiting = Gauge(
            "crossnet_config_restart_needed",
            "1 while the file on disk asks for what takes a restart.",
            registry=registry,
        )
        self._loaded = Gauge("crossnet_config_loaded_timestamp_seconds", "When what runs was read.", registry=registry)
        self._info = Info("crossnet_config", "The file that runs.", registry=registry)
        self.status: dict[str, object] = {"file": str(path)}
        """The configuration in use, and what of the file is not in use, for the status page."""
        self._seen = self._stamps()
        self._retry_at = 0.0
        self._note(self._digest())

    def ask(self) -> None:
        """Read the file now, even if it has not changed."""
        self._asked.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        pending: Stamps | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await self._asked.wait()
            stamps = self._stamps()
            asked = self._asked.is_set()
            if asked:
                self._asked.clear()
            elif stamps == self._seen and not (self.status["faults"] and loop.time() >= self._retry_at):
                pending = None
                continue
            elif stamps == self._seen:
                pass
            elif stamps != pending:
                pending = stamps
                continue
            pending = None
            try:
                await self._reload(stamps)
            except ConfigError as error:
                self._refuse(stamps, [str(fault) for fault in error.faults], again=asked)
            except Refused as error:
                self._refuse(stamps, [str(error)], again=asked)
            except Exception as error:  # a bug must not end the process
                faults = [f"an unexpected error: {type(error).__name__}: {error}"]
                if self._refuse(stamps, faults, again=asked):
                    log.error("reload_failed", exc_info=error, extra={"event": {"file": str(self._path)}})

    async def _reload(self, stamps: Stamps) -> None:
        """Read and apply. If it raises, nothing has changed."""

        def read() -> tuple[str, Config, Change]:
            digest, new = self._digest(), load(self._path)
            return digest, new, change(self._config, new)

        # In a thread: PyYAML takes a second for the largest file that we accept, and streams must continue meanwhile.
        digest, new, made = await asyncio.to_thread(read)
        if made.applied:
            self._apply(made.config)
            self._config = made.config
        self._seen = stamps if set(files(new)) == set(files(self._config)) else self._stamps()
        self._reloads.labels("applied" if made.applied else "unchanged").inc()
        self._note(digest, made.restart)
        event = {"file": str(self._path), "sha256": digest, "applied": made.applied, "restart_needed": made.restart}
        log.log(logging.WARNING if made.restart else logging.INFO, "config_read", extra={"event": event})

    def _refuse(self, stamps: Stamps, faults: list[str], *, again: bool) -> bool:
        """Log that the file is refused: only once, unless `again`. Returns whether it was logged."""
        self._seen = stamps
        self._retry_at = asyncio.get_running_loop().time() + RETRY_S
        if faults == self.status["faults"] and not again:
            return False
        self._reloads.labels("refused").inc()
        self._good.set(0)
        self.status["faults"] = faults
        for fault in faults:
            log.error("config_fault", extra={"event": {"file": str(self._path), "fault": fault}})
        event = {"file": str(self._path), "faults": len(faults), "detail": "what ran before goes on"}
        log.error("config_refused", extra={"event": event})
        return True

    def _note(self, digest: str, restart: tuple[str, ...] = ()) -> None:
        now = time.time()
        self._good.set(1)
        self._waiting.set(1 if restart else 0)
        self._loaded.set(now)
        self._info.info({"sha256": digest})
        self.status |= {"sha256": digest, "read_at": round(now, 3), "restart_needed": list(restart), "faults": []}

    def _digest(self) -> str:
        """Return the file's SHA-256 in hexadecimal; "" if it cannot be read."""
        try:
            return hashlib.sha256(self._path.read_bytes()).hexdigest()
        except OSError:
            return ""

    def _stamps(self) -> Stamps:
        """Return fingerprints of all files. Symbolic links are followed, so a replaced link counts as a change."""
        return {path: fingerprint(path) for path in {self._path, *files(self._config)}}
