"""One allocation: redirects, reasons of errors, and how its end is detected."""

import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from discovery.model.mesh import AnyRecord, Kind, Record, TurnSpec
from sniproxy.engine import SocketStream
from tests.support.coturn import Coturn
from tests.support.embedded_turn import embedded
from tests.support.registered import ID, Registered, registrar, relay, turn
from tests.support.scripted_turn import Answer, Scripted, error, good, scripted, signed
from tests.support.turn_servers import RunningServer
from tests.support.waiting import eventually
from turnreg.client.allocation import Timing, TurnReason
from turnreg.stun.message import Attribute, Message, Method

pytestmark = pytest.mark.anyio

RELAYS = relay({"turn-1": ["127.0.0.1"]})


@asynccontextmanager
async def registered(
    script: dict[Method, list[Answer]] | None = None, *records: AnyRecord, **options: Any
) -> AsyncIterator[tuple[Scripted, Registered]]:
    """Run a registrar against a server that answers as it is told."""
    async with (
        scripted(script) as server,
        registrar(turn(RunningServer(server.address, server.port)), *records, **options) as ours,
    ):
        yield server, ours


def redirect(to: tuple[str, int]) -> Answer:
    def answer(request: Message) -> bytes:
        packed = bytes([0, 1]) + to[1].to_bytes(2, "big") + bytes(map(int, to[0].split(".")))
        return signed(request.refused(300, "as told").with_bytes(Attribute.ALTERNATE_SERVER, packed))

    return answer


async def test_a_redirect_is_followed_with_the_same_credentials() -> None:
    with embedded() as there:
        script = {Method.ALLOCATE: [redirect((there.address, there.port))]}
        async with registered(script, RELAYS) as (_, ours):
            spec = await ours.publishes(ID)
            assert ours.registrar.servers == {(there.address, there.port)}
            bound, writer = await ours.stream(spec.port)  # its data connection goes there, too
            bound.stream.close()
            writer.close()


async def test_a_redirect_is_followed_once() -> None:
    async with scripted() as first, scripted() as second:
        first.script = {Method.ALLOCATE: [redirect((second.address, second.port))]}
        second.script = {Method.ALLOCATE: [redirect((first.address, first.port))]}
        async with registrar(turn(RunningServer(first.address, first.port))) as ours:
            await eventually(lambda: ours.count("registrations_total", reason="redirected") > 0)
            assert second.requests


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (redirect(("169.254.169.254", 80)), TurnReason.REFUSED_ADDRESS),
        (redirect(("192.0.2.7", 3478)), TurnReason.REFUSED_ADDRESS),  # it is not where the network is pinned to
        (error(300), TurnReason.REDIRECTED),
        (
            lambda request: signed(request.refused(300, "").with_bytes(Attribute.ALTERNATE_SERVER, b"\0\1\1")),
            TurnReason.BAD_ANSWER,
        ),
    ],
)
async def test_a_redirect_that_leads_nowhere(answer: Answer, reason: TurnReason) -> None:
    async with registered({Method.ALLOCATE: [answer]}) as (_, ours):
        await eventually(lambda: ours.count("registrations_total", reason=reason) > 0)


CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    437: "mismatch",
    438: "stale_nonce",
    440: "family",
    441: "wrong_credentials",
    442: "unsupported_transport",
    443: "family",
    446: "peer_taken",
    447: "peer_unreachable",
    486: "quota",
    500: "rejected",
    508: "capacity",
}


@pytest.mark.parametrize(("code", "reason"), CODES.items())
async def test_every_refusal_has_its_reason_in_the_metrics_and_ends_with_an_allocation(code: int, reason: str) -> None:
    """After two refusals the registration succeeds by itself."""
    challenge = "n1" if code == 438 else None
    refusals = [error(code, nonce=challenge)] * (8 if code == 438 else 2)
    async with registered({Method.ALLOCATE: [*refusals, good]}) as (_, ours):
        await ours.publishes(ID)
        assert ours.count("registrations_total", reason=reason) == 2
        assert ours.count("registrations_total", reason="ok") == 1


@contextmanager
def stock(*options: str, **fields: Any) -> Iterator[tuple[Coturn, RunningServer]]:
    """Run Debian's coturn."""
    server = Coturn(extra=options, **fields)
    try:
        server.start()
        yield server, RunningServer(server.address, server.port)
    finally:
        server.close()


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_coturn_without_tcp_allocations() -> None:
    with stock("--no-tcp-relay") as (_, at):
        async with registrar(turn(at)) as ours:
            await eventually(lambda: ours.count("registrations_total", reason="unsupported_transport") > 1)
            assert "442 TCP Transport is not allowed" in ours.of()["last_error"]["detail"]
            assert not ours.discovery.published


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_coturn_without_a_free_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with stock(relay_range=(port, port)) as (_, at):
            # coturn tries its only port again and again before it answers 508: seconds of its processor.
            async with registrar(turn(at), timing=Timing(transaction_s=60.0)) as ours:
                await eventually(lambda: ours.count("registrations_total", reason="capacity") > 0, 60)
                assert "508" in ours.of()["last_error"]["detail"]
                taken.close()
                await eventually(lambda: ours.discovery.published, 60)
                assert ours.discovery.published[ID].port == port


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_coturn_without_the_requested_family() -> None:
    with stock() as (_, at):
        spec = TurnSpec(url=f"turn:{at.address}:{at.port}", relay_addresses=["fd00::7"], port_min=1024, port_max=65535)
        async with registrar(Record(kind=Kind.TURN, network="a", id="turn-1", revision=1, spec=spec)) as ours:
            await eventually(lambda: ours.count("registrations_total", reason="family") > 1)
            assert "440" in ours.of()["last_error"]["detail"]


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_coturn_that_redirects() -> None:
    with stock() as (target, _), stock(f"--alternate-server=127.0.0.1:{target.port}") as (_, at):
        async with registrar(turn(at), RELAYS) as ours:
            spec = await ours.publishes(ID)
            assert target.relay_range[0] <= spec.port <= target.relay_range[1]
            bound, writer = await ours.stream(spec.port)
            bound.stream.close()
            writer.close()


@pytest.mark.interop
@pytest.mark.needs("turnserver")
async def test_coturn_that_hangs() -> None:
    """Its kernel still acknowledges what we send; only an answer shows that the process is alive."""
    timing = Timing(keepalive_s=0.1, transaction_s=0.3, connect_s=1, close_s=0.1)
    with stock() as (server, at):
        async with registrar(turn(at), timing=timing) as ours:
            await ours.publishes(ID)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                await eventually(lambda: ours.count("registrations_total", reason="timeout") > 1)
                assert not ours.discovery.published
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await ours.publishes(ID)


NONSENSE: dict[str, tuple[Answer, str]] = {
    "malformed": (lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n", "malformed"),
    "bad integrity": (lambda request: signed(request.success(), b"x" * 16), "timeout"),
    "unsigned success": (lambda request: request.success().pack(), "timeout"),
    "silence": (lambda _: b"", "timeout"),
    "no relayed address": (lambda request: signed(request.success()), "bad_answer"),
}


@pytest.mark.parametrize(("answer", "reason"), NONSENSE.values(), ids=NONSENSE.keys())
async def test_invalid_answers_have_reasons_too(answer: Answer, reason: str) -> None:
    timing = Timing(transaction_s=0.2, close_s=0.2)
    async with registered({Method.ALLOCATE: [answer, good]}, timing=timing) as (_, ours):
        await ours.publishes(ID)
        assert ours.count("registrations_total", reason=reason) == 1


async def test_a_reset_ends_the_allocation_and_a_new_one_is_made() -> None:
    async with registered() as (server, ours):
        await ours.publishes(ID)
        assert server.control is not None
        server.control.transport.abort()
        await eventually(lambda: ours.count("registrations_total", reason="connection_lost") == 1)
        await eventually(lambda: ours.count("registrations_total", reason="ok") == 2)


async def test_the_same_failure_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    async with registered({Method.ALLOCATE: [error(486)]}) as (server, ours):
        await eventually(lambda: ours.count("registrations_total", reason="quota") > 4)
        assert caplog.text.count("registration_failed") == 1
        server.script = {Method.ALLOCATE: [error(508)]}
        await eventually(lambda: ours.count("registrations_total", reason="capacity") > 2)
        assert caplog.text.count("registration_failed") == 2


async def test_keep_alive_detects_silence() -> None:
    timing = Timing(keepalive_s=0.1, transaction_s=0.1, close_s=0.1)
    async with registered(timing=timing) as (server, ours):
        await ours.publishes(ID)
        await eventually(lambda: server.count(Method.BINDING) > 1)
        assert not any(one.has_integrity for one in server.requests if one.method == Method.BINDING)
        assert server.count(Method.REFRESH) == 0
        server.script = {Method.BINDING: [lambda _: b""]}  # as a server does that was told to answer none
        await eventually(lambda: server.count(Method.REFRESH) > 2)
        assert ours.count("registrations_total", reason="ok") == 1
        server.script |= {Method.REFRESH: [lambda _: b""]}
        await eventually(lambda: ours.count("registrations_total", reason="timeout") > 0)


async def test_tcp_user_timeout_ends_the_control_connection_but_no_stream() -> None:
    def user_timeout_ms(stream: SocketStream) -> int:
        return stream._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    with embedded() as server:
        async with registrar(turn(RunningServer(server.address, server.port)), RELAYS) as ours:
            spec = await ours.publishes(ID)
            bound, writer = await ours.stream(spec.port)
            [held] = ours.registrar._registrations.values()
            assert held.allocations.current is not None
            assert held.allocations.current.allocation is not None
            assert held.allocations.current.allocation._control is not None
            assert user_timeout_ms(held.allocations.current.allocation._control._stream) == 20_000
            assert user_timeout_ms(bound.stream) == 0  # type: ignore[arg-type]
            bound.stream.close()
            writer.close()
