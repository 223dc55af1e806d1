"""Accepting: each connection in its own task, whatever happens to others, to memory, or at the limits of the process."""

import asyncio
import errno
import logging
import os
import resource
import socket
import struct

import pytest

from sniproxy.engine import Listener, SocketStream, connect
from sniproxy.engine.listener import CAPACITY_ERRNOS, TRANSIENT_ERRNOS, log
from sniproxy.engine.socket_stream import KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES
from tests.support.streams import read_all, until_reset

pytestmark = pytest.mark.anyio


async def echo(stream: SocketStream) -> None:
    while data := await stream.recv():
        await stream.send(data)
    stream.shutdown_write()


async def ask(listener: Listener, question: bytes = b"ping") -> bytes:
    """Be a client of `echo`."""
    async with asyncio.timeout(10):
        stream = await connect(*listener.address, timeout_s=10)
        try:
            await stream.send(question)
            stream.shutdown_write()
            return await read_all(stream)
        finally:
            stream.close()


class Refusing:
    """A listening socket whose accept fails with these errors, then works again."""

    def __init__(self, sock: socket.socket, *errors: int) -> None:
        self.sock = sock
        self.errors = list(errors)

    def accept(self) -> tuple[socket.socket, object]:
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        return self.sock.accept()

    def close(self) -> None:
        self.sock.close()


async def test_connections_are_served_side_by_side() -> None:
    listener = await Listener.open("127.0.0.1", 0)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(echo))
        silent = await connect(*listener.address, timeout_s=5)
        assert await ask(listener) == b"ping"
        assert await ask(listener) == b"ping"
        silent.close()
        listener.close()
        await serving


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_the_chosen_port_is_told(address: str) -> None:
    listener = await Listener.open(address, 0)
    assert listener.address[0] == address
    assert listener.address[1] > 0
    listener.close()


async def test_a_taken_port_is_named() -> None:
    first = await Listener.open("127.0.0.1", 0)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {first.address[1]}") as failed:
        await Listener.open("127.0.0.1", first.address[1])
    assert failed.value.errno == errno.EADDRINUSE
    first.close()


async def test_the_port_can_be_used_again_at_once() -> None:
    """Connections of the previous owner are still in TIME_WAIT."""
    first = await Listener.open("127.0.0.1", 0)
    port = first.address[1]
    async with asyncio.TaskGroup() as group:

        async def end_first(stream: SocketStream) -> None:
            stream.close()

        serving = group.create_task(first.serve(end_first))
        client = await connect("127.0.0.1", port, timeout_s=5)
        assert await client.recv() == b""
        client.close()
        first.close()
        await serving
    second = await Listener.open("127.0.0.1", port)
    second.close()


async def test_two_can_share_a_port() -> None:
    first = await Listener.open("127.0.0.1", 0, reuse_port=True)
    second = await Listener.open("127.0.0.1", first.address[1], reuse_port=True)
    assert first.address == second.address
    first.close()
    second.close()


async def test_close_stops_accepting_and_lets_streams_end() -> None:
    listener = await Listener.open("127.0.0.1", 0)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(echo))
        open_one = await connect(*listener.address, timeout_s=5)
        await open_one.send(b"before")
        assert await open_one.recv() == b"before"
        listener.close()
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            await connect(*listener.address, timeout_s=5)
        assert not serving.done()
        await open_one.send(b"and after")
        assert await open_one.recv() == b"and after"
        open_one.close()
        async with asyncio.timeout(5):
            await serving


async def test_closed_before_it_serves() -> None:
    listener = await Listener.open("127.0.0.1", 0)
    listener.close()
    async with asyncio.timeout(5):
        await listener.serve(echo)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_both_ends_find_a_peer_that_vanished_and_delay_nothing(address: str) -> None:
    def options(sock: socket.socket) -> list[int]:
        kinds = [socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
        keepalive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return [keepalive, *(sock.getsockopt(socket.IPPROTO_TCP, kind) for kind in kinds)]

    accepted: list[SocketStream] = []

    async def note(stream: SocketStream) -> None:
        accepted.append(stream)
        assert options(stream._sock) == [1, 1, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES]
        await echo(stream)

    listener = await Listener.open(address, 0)
    async with asyncio.TaskGroup() as group:
        group.create_task(listener.serve(note))
        stream = await connect(*listener.address, timeout_s=5)
        assert options(stream._sock) == [1, 1, KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES]
        await stream.send(b"ping")
        assert await stream.recv() == b"ping", "else the options of the accepted one are wrong"
        stream.close()
        listener.close()
    assert len(accepted) == 1


async def test_cancelling_closes_every_connection() -> None:
    listener = await Listener.open("127.0.0.1", 0)
    served: list[SocketStream] = []
    arrived = asyncio.Semaphore(0)

    async def hold(stream: SocketStream) -> None:
        served.append(stream)
        arrived.release()
        await asyncio.get_running_loop().create_future()

    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(hold))
        clients = [await connect(*listener.address, timeout_s=5) for _ in range(5)]
        for _ in range(4):
            await arrived.acquire()
        serving.cancel()
    assert all(stream.closed for stream in served)
    for client in clients:
        async with asyncio.timeout(5):
            try:
                assert await client.recv() == b""
            except ConnectionResetError:
                pass  # that one was still in the backlog
        client.close()
    with pytest.raises(ConnectionRefusedError):
        await connect(*listener.address, timeout_s=5)


async def test_a_connection_whose_task_never_ran_is_closed() -> None:
    listener = await Listener.open("127.0.0.1", 0)
    client = await connect(*listener.address, timeout_s=5)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(echo))
        accept_batch = listener._accept_batch

        def then_cancel(*arguments: object) -> float:
            serving.cancel()  # between the accept and the first step of the connection's task
            return accept_batch(*arguments)  # type: ignore[arg-type]

        listener._accept_batch = then_cancel  # type: ignore[method-assign,assignment]
    async with asyncio.timeout(5):
        assert await client.recv() == b""
    client.close()


async def test_a_handlers_error_ends_its_own_connection_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(stream: SocketStream) -> None:
        if await stream.recv() == b"boom":
            raise ZeroDivisionError("a defect of ours")
        await stream.send(b"fine")

    listener = await Listener.open("127.0.0.1", 0)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(broken))
        with caplog.at_level(logging.ERROR):
            assert await ask(listener, b"boom") == b""
        assert await ask(listener, b"ok") == b"fine"
        listener.close()
        await serving
    assert [record.exc_info and record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


@pytest.mark.parametrize("code", sorted(CAPACITY_ERRNOS))
async def test_without_descriptors_or_memory_connections_wait(code: int, caplog: pytest.LogCaptureFixture) -> None:
    listener = await Listener.open("127.0.0.1", 0, capacity_pause_s=0.001)
    listener._sock = Refusing(listener._sock, *[code] * 20)  # type: ignore[assignment]
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(echo))
        assert await ask(listener) == b"ping"
        listener.close()
        await serving
    said = f"accept: {os.strerror(code)} on 127.0.0.1 port {listener.address[1]}: connections wait"
    assert len(caplog.records) == 1, "said once a second, not once a try"
    assert caplog.records[0].getMessage().startswith(said)


class Complaints(logging.Handler):
    """Sets an event at the first line."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = asyncio.Event()

    def emit(self, line: logging.LogRecord) -> None:
        self.heard.set()


async def test_out_of_descriptors_for_real() -> None:
    complaints = Complaints()
    listener = await Listener.open("127.0.0.1", 0)
    clients = [await connect(*listener.address, timeout_s=5) for _ in range(3)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, limits[1]))
    held = []
    log.addHandler(complaints)
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(listener.serve(echo))
            for client in clients:
                await client.send(b"are you there?")
            await complaints.heard.wait()
            for descriptor in held:
                os.close(descriptor)
            held.clear()
            for client in clients:
                async with asyncio.timeout(5):
                    assert await client.recv() == b"are you there?"
                client.close()
            listener.close()
            await serving
    finally:
        log.removeHandler(complaints)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)


@pytest.mark.parametrize("code", sorted(TRANSIENT_ERRNOS))
async def test_an_error_of_one_connection_is_not_the_listeners(code: int) -> None:
    """On Linux, accept(2) returns network errors of the connection that waits."""
    listener = await Listener.open("127.0.0.1", 0)
    listener._sock = Refusing(listener._sock, code, code)  # type: ignore[assignment]
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(echo))
        assert await ask(listener) == b"ping"
        listener.close()
        await serving


async def test_any_other_error_of_accept_is_not_hidden() -> None:
    listener = await Listener.open("127.0.0.1", 0)
    listener._sock = Refusing(listener._sock, errno.EBADF)  # type: ignore[assignment]
    with pytest.raises(ExceptionGroup) as failed:
        async with asyncio.TaskGroup() as group:
            group.create_task(listener.serve(echo))
            client = await connect(*listener.address, timeout_s=5)
    client.close()
    assert failed.group_contains(OSError, match="Bad file descriptor")


async def test_a_peer_that_is_gone_at_accept_is_known_by_its_address() -> None:
    """The kernel delivers what it sent before its reset, and the handler finds the reset afterwards."""
    seen: list[tuple[tuple[str, int], bytes]] = []
    done = asyncio.Event()

    async def read(stream: SocketStream) -> None:
        seen.append((stream.peer, await stream.recv()))
        with pytest.raises(OSError, match=r"."):
            await stream.send(b"x")
            await until_reset(stream)
            await stream.send(b"x")
        done.set()

    listener = await Listener.open("127.0.0.1", 0)
    client = socket.create_connection(listener.address)
    address = client.getsockname()
    client.sendall(b"last words")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(read))
        async with asyncio.timeout(5):
            await done.wait()
        listener.close()
        await serving
    assert seen == [(address, b"last words")]


async def test_a_burst_is_served_whole() -> None:
    listener = await Listener.open("127.0.0.1", 0)
    clients = []
    for _ in range(200):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(listener.address)
        clients.append(SocketStream(sock, listener.address))
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(listener.serve(echo))
        for number, client in enumerate(clients):
            await client.writable()
            await client.send(b"%d" % number)
            client.shutdown_write()
        for number, client in enumerate(clients):
            assert await read_all(client) == b"%d" % number
            client.close()
        listener.close()
        await serving
