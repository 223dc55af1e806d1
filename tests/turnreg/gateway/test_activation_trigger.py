"""Triggers: real commands and real HTTP calls, which end in time whatever they do."""

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from tests.support.waiting import eventually
from turnreg.gateway.activation_trigger import MAX_SAID, Command, HttpCall, TriggerError, fire

pytestmark = pytest.mark.anyio

SERVICE = "orders.shop.example"


async def run(*argv: str, timeout_s: float = 20) -> None:
    await fire(Command(argv), SERVICE, "b", timeout_s=timeout_s)


async def failed(*argv: str, timeout_s: float = 20) -> TriggerError:
    with pytest.raises(TriggerError) as caught:
        await run(*argv, timeout_s=timeout_s)
    return caught.value


def is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def gone(pid: int) -> None:
    """Wait until a process has ended, as a zombie or completely."""
    await eventually(lambda: is_over(pid))


# --- commands -------------------------------------------------------------------------------------------------------


async def test_a_command_is_told_what_to_wake(tmp_path: Path) -> None:
    await run("sh", "-c", f'echo "$CROSSNET_SERVICE $CROSSNET_NETWORK $PATH" >{tmp_path}/said')
    assert (tmp_path / "said").read_text() == f"{SERVICE} b {os.environ['PATH']}\n"


async def test_a_command_gets_nothing_of_ours(tmp_path: Path) -> None:
    """Otherwise a server that it starts would keep our listening sockets open after our end."""
    with socket.create_server(("127.0.0.1", 0)) as ours:
        ours.set_inheritable(True)
        await run("sh", "-c", f"ls -l /proc/$$/fd >{tmp_path}/said")
    said = (tmp_path / "said").read_text()
    assert " 0 -> /dev/null" in said
    assert "socket:" not in said
    assert said.count("pipe:") <= 2


async def test_no_shell_reads_the_arguments(tmp_path: Path) -> None:
    await run("touch", f"{tmp_path}/$(id) ; *")
    assert os.listdir(tmp_path) == ["$(id) ; *"]


@pytest.mark.parametrize(
    ("argv", "detail"),
    [
        (("false",), "exit code 1"),
        (("sh", "-c", "echo no such; echo deployment >&2; exit 3"), "exit code 3: no such deployment"),
        (("sh", "-c", "kill -9 $$"), "ended by signal 9"),
        (("no-such-program",), "no-such-program cannot be run: No such file or directory"),
        (("/etc/passwd",), "/etc/passwd cannot be run: Permission denied"),
    ],
)
async def test_a_command_that_fails(argv: tuple[str, ...], detail: str) -> None:
    error = await failed(*argv)
    assert error.detail == detail
    assert not error.timed_out


async def test_of_much_output_the_end_is_kept() -> None:
    error = await failed("sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the end; exit 1")
    assert error.detail.endswith("x the end")
    assert len(error.detail) <= len("exit code 1: ") + MAX_SAID


async def test_at_its_deadline_a_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script = f"trap '' TERM; sleep 1000 & echo $! $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; wait"
    error = await failed("sh", "-c", script, timeout_s=0.5)
    assert (error.detail, error.timed_out) == ("not done in 0.5 s", True)
    for pid in (tmp_path / "pids").read_text().split():
        await gone(int(pid))


async def test_cancelled_a_command_is_ended_too(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(
            run("sh", "-c", f"echo $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 1000")
        )
        await eventually((tmp_path / "pid").exists)
        task.cancel()
    await gone(int((tmp_path / "pid").read_text()))


async def test_processes_left_by_a_command_are_not_awaited(tmp_path: Path) -> None:
    """Even if it keeps the command's output open and keeps running."""
    await run("sh", "-c", f"sleep 1000 & echo $! >{tmp_path}/pid")
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)
    os.kill(pid, 9)


async def test_a_command_that_cannot_be_watched_is_not_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(pid: int) -> int:
        (tmp_path / "pid").write_text(str(pid))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", forbidden)
    assert (await failed("sleep", "1000")).detail == "the command cannot be watched: Operation not permitted"
    assert is_over(int((tmp_path / "pid").read_text()))


async def test_a_command_costs_no_descriptors() -> None:
    await run("true")
    before = len(os.listdir("/proc/self/fd"))
    for argv in (("true",), ("false",), ("no-such-program",), ("sleep", "1000")):
        try:
            await run(*argv, timeout_s=0.2)
        except TriggerError:
            continue
    assert len(os.listdir("/proc/self/fd")) <= before


# --- calls ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def scaler(folder: Path) -> AsyncIterator[tuple[str, Path, list[web.Request]]]:
    """A real HTTPS server; its URL, its authority's certificate and what it was asked."""
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request)
        await request.read()
        match request.path:
            case "/moved":
                return web.Response(status=307, headers={"Location": "/ok"})
            case "/no":
                return web.Response(status=503, text="no\nroom " + "x" * 100_000)
            case "/silent":
                await asyncio.Event().wait()
        return web.Response(status=202)

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield f"https://127.0.0.1:{runner.addresses[0][1]}", folder / "ca.pem", asked
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
async def test_a_call_says_what_to_wake(tmp_path: Path, method: str) -> None:
    async with scaler(tmp_path) as (url, ca, asked):
        call = HttpCall(url=f"{url}/wake?now=1", method=method, ca=ca, token="secret")
        await fire(call, SERVICE, "b", timeout_s=10)
        assert "secret" not in repr(call)
        (request,) = asked
        assert (request.method, request.path_qs) == (method, "/wake?now=1")
        assert request.headers["Crossnet-Service"] == SERVICE
        assert request.headers["Crossnet-Network"] == "b"
        assert request.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("path", "detail"),
    [("/no", "status 503: no room xxxx"), ("/moved", "status 307"), ("/silent", "not done in 0.5 s")],
)
async def test_a_call_that_fails(tmp_path: Path, path: str, detail: str) -> None:
    async with scaler(tmp_path) as (url, ca, asked):
        with pytest.raises(TriggerError) as caught:
            await fire(HttpCall(url=url + path, ca=ca), SERVICE, "b", timeout_s=0.5)
        assert caught.value.detail.startswith(detail)
        assert len(caught.value.detail) < 200
        assert caught.value.timed_out == (path == "/silent")
        assert len(asked) == 1


async def test_no_request_to_a_server_that_cannot_be_verified(tmp_path: Path) -> None:
    async with scaler(tmp_path) as (url, _, asked):
        with pytest.raises(TriggerError, match=r"(?i)certificate"):
            await fire(HttpCall(url=url), SERVICE, "b", timeout_s=10)
        assert not asked


async def test_a_server_that_is_not_there() -> None:
    with pytest.raises(TriggerError, match="Connect"):
        await fire(HttpCall(url="http://127.0.0.1:1/"), SERVICE, "b", timeout_s=10)


async def test_a_missing_ca_file(tmp_path: Path) -> None:
    with pytest.raises(TriggerError, match="No such file"):
        await fire(HttpCall(url="https://127.0.0.1:1/", ca=tmp_path / "ca.pem"), SERVICE, "b", timeout_s=10)
