"""A new configuration for a running process: read when the file or a secret in it changes, or on SIGHUP; taken whole or not at all.

What decides about the streams to come changes at once: rules, allow-lists, imports, signing keys, credentials, limits, time-outs,
log. What a role has bound or published stays until a restart, and it is said that it does. A file with any fault changes nothing,
and every fault is in the log. So does an error of our own while it is applied: what ran before is put back as a whole.
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
from crossnet.config.schema import faults_of, fields_of, is_live
from crossnet.config.sections import Config
from crossnet.config.types import Certificates, Secret
from discovery.files.fingerprint import Fingerprint, fingerprint

log = logging.getLogger("crossnet")

WATCH_INTERVAL_S = 1.0
"""A stat of each file a second costs nothing. A change is read once it has stood still for that long: a file that an editor is
writing may read as a shorter one without fault."""

RETRY_S = 10.0
"""A file with faults is read again after this time: what it lacked may be a key's file that has come since."""

Stamps: TypeAlias = dict[Path, Fingerprint | None]


@dataclass(frozen=True, slots=True)
class Change:
    """What a new file comes to."""

    config: Config
    """The old configuration with what can change at once."""
    applied: tuple[str, ...]
    restart: tuple[str, ...]
    """Paths that are different in the file and wait for a restart."""


def change(old: Config, new: Config) -> Change:
    """Tell what of a new file can be applied to a running process.

    What would contradict something that waits for a restart waits with it, and all that the file changes besides.
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
    """Yield the files whose content a configuration holds: secrets and certificates."""
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
    """A configuration without fault that cannot be gone by here; the text says where and why."""


class Reloader:
    """Watches one file for one process. `run` it; `ask` reads at once."""

    def __init__(
        self, path: Path, config: Config, apply: Callable[[Config], None], registry: CollectorRegistry
    ) -> None:
        """Take the file, what was read of it, and what makes the process go by another: `apply`.

        That raises Refused for a configuration that it cannot go by, and leaves all as before whatever it raises.
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
        """Which configuration runs, and what of the file does not."""
        self._seen = self._stamps()
        self._retry_at = 0.0
        self._note(self._digest())

    def ask(self) -> None:
        """Read the file now, whether it looks changed or not."""
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
            except Exception as error:  # a defect of ours: what runs must not end for it
                faults = [f"an unexpected error: {type(error).__name__}: {error}"]
                if self._refuse(stamps, faults, again=asked):
                    log.error("reload_failed", exc_info=error, extra={"event": {"file": str(self._path)}})

    async def _reload(self, stamps: Stamps) -> None:
        """Read and apply. If it raises, nothing has changed."""

        def read() -> tuple[str, Config, Change]:
            digest, new = self._digest(), load(self._path)
            return digest, new, change(self._config, new)

        # PyYAML takes a second for the largest file that we read; streams go on meanwhile.
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
        """Say that the file is not taken: once, unless somebody has asked `again`. Tell whether it was said."""
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
        """What `sha256sum` says of the file; of no file nothing."""
        try:
            return hashlib.sha256(self._path.read_bytes()).hexdigest()
        except OSError:
            return ""

    def _stamps(self) -> Stamps:
        """What tells that a file is another: the file behind a symbolic link counts, so that swapped links do, too."""
        return {path: fingerprint(path) for path in {self._path, *files(self._config)}}
