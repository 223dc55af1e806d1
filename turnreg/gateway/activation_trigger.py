"""Triggers that wake a sleeping service: a command or an HTTP call. Time and reported output are bounded."""

import asyncio
import os
import signal
import ssl
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import aiohttp

MAX_SAID = 160
"""Bytes of output in an error: the end of what a command printed, or the start of a server's answer."""

_READ_BYTES: Final = 64 * 1024
_REAP_TIMEOUT_S: Final = 1.0
"""Time for the kernel to end a killed process."""


class TriggerError(Exception):
    """The service was not woken. `timed_out` is true if the trigger ran into its deadline."""

    def __init__(self, detail: str, *, timed_out: bool = False) -> None:
        super().__init__(detail)
        self.detail = detail
        self.timed_out = timed_out


@dataclass(frozen=True, slots=True)
class Command:
    """A program and its arguments, run without a shell. It has to exit by itself; processes that it leaves behind are not tracked.

    The environment variables CROSSNET_SERVICE and CROSSNET_NETWORK say what to wake.
    """

    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall:
    """An HTTP request. The headers Crossnet-Service and Crossnet-Network say what to wake. Any 2xx answer is a success."""

    url: str
    method: str = "POST"
    body: str = ""
    content_type: str = "application/json"
    """Content-Type of the body, if there is one."""
    ca: Path | None = None
    """Authorities that verify the server; the system's by default."""
    token: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""


Trigger: TypeAlias = Command | HttpCall


async def fire(trigger: Trigger, service: str, network: str, *, timeout_s: float) -> None:
    """Run a trigger for a service within `timeout_s`. Cancelling kills a command.

    Raises:
        TriggerError: the trigger could not be started, failed, or took too long.
    """
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(trigger, Command):
                await _run(trigger, os.environ | {"CROSSNET_SERVICE": service, "CROSSNET_NETWORK": network})
            else:
                await _call(trigger, {"Crossnet-Service": service, "Crossnet-Network": network})
    except TimeoutError:
        raise TriggerError(f"not done in {timeout_s:g} s", timed_out=True) from None


async def _run(command: Command, environment: Mapping[str, str]) -> None:
    # A pipe of our own: a process that the command leaves behind may keep it open after the command has ended.
    reading, writing = os.pipe()
    said = bytearray()

    def read() -> bool:
        """Read what is available; False if there is nothing more for now."""
        try:
            piece = os.read(reading, _READ_BYTES)
        except BlockingIOError:
            return False
        if not piece:
            loop.remove_reader(reading)
        said[:] = (said + piece)[-MAX_SAID:]
        return bool(piece)

    loop = asyncio.get_running_loop()
    os.set_blocking(reading, False)
    try:
        try:
            process = _started(command, environment, writing)
        finally:
            os.close(writing)
        loop.add_reader(reading, read)
        code = await _ended(process)
        if code != 0:
            while read():
                pass
            ended = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
            raise TriggerError(f"{ended}: {_shown(said)}" if said else ended)
    finally:
        loop.remove_reader(reading)
        os.close(reading)


def _started(command: Command, environment: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    """Start the command without our descriptors. uvloop's subprocess would pass on inheritable ones, such as listening sockets that
    this process was handed."""
    try:
        return subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise TriggerError(f"{command.argv[0]} cannot be run: {getattr(error, 'strerror', None) or error}") from error


async def _ended(process: subprocess.Popen[bytes]) -> int:
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    try:
        watched = os.pidfd_open(process.pid)
    except OSError as error:  # a kernel before 5.3, no descriptor left, or forbidden by a sandbox
        process.kill()
        process.wait()
        raise TriggerError(f"the command cannot be watched: {error.strerror}") from error
    loop.add_reader(watched, exited.set)
    try:
        await exited.wait()
    except asyncio.CancelledError:  # by its timeout, or because we stop
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it has a session of its own: the program and all that it started
        with suppress(TimeoutError):
            async with asyncio.timeout(_REAP_TIMEOUT_S):
                await exited.wait()
        raise
    finally:
        loop.remove_reader(watched)
        os.close(watched)
        code = process.poll()
    assert code is not None, "a pidfd is readable once the process can be waited for"
    return code


async def _call(call: HttpCall, headers: dict[str, str]) -> None:
    body = call.body.encode() or None
    if body is not None:
        headers["Content-Type"] = call.content_type
    if call.token is not None:
        headers["Authorization"] = f"Bearer {call.token}"
    try:
        # In a thread: loading all of the system's authorities takes tens of milliseconds.
        context = await asyncio.to_thread(ssl.create_default_context, cafile=call.ca)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), auto_decompress=False) as session,
            session.request(call.method, call.url, headers=headers, data=body, allow_redirects=False) as answer,
        ):
            if not 200 <= answer.status < 300:
                said = await answer.content.read(MAX_SAID)
                raise TriggerError(f"status {answer.status}" + (f": {_shown(said)}" if said else ""))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise TriggerError(f"{type(error).__name__}: {error}"[:MAX_SAID]) from error


def _shown(said: bytes | bytearray) -> str:
    return " ".join(said.decode(errors="replace").split())
