"""Connecting: which failure leads to which next candidate, what is sent before READY, and what is never sent twice."""

import asyncio
import hashlib
import itertools
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from sniproxy.relay.upstreams import MAX_CANDIDATES, Connected, Upstreams
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import MAX_FIRST_WRITE, Candidate, Traits
from sniproxy.transport.direct import DIRECT
from sniproxy.transport.errors import DialError
from sniproxy.transport.local import LOCAL
from sniproxy.transport.turn import TURN as REAL_TURN
from sniproxy.tunnel.capsules import CapsuleType, header
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.messages import Finished, Opened, Ready, Refused, Waiting
from sniproxy.tunnel.preamble import SigningKey
from sniproxy.tunnel.relay_handshake import GatewayConnector, StreamRequest
from tests.support.hellos import client_hello, padding
from tests.support.scripted_gateways import (
    Script,
    ScriptedGateway,
    Visit,
    ends,
    opens,
    refuses,
    reset,
    reset_behind_ready,
    says,
    scripted,
    silent,
    silent_behind_ready,
)
from tests.support.stream_requests import HELLO, call, upstreams

pytestmark = pytest.mark.anyio

PAUSES = (0.001, 0.002, 0.003)
TURN = replace(REAL_TURN, reset_retry_s=PAUSES)


def candidate(
    gateway: ScriptedGateway | int, *, traits: Traits = TURN, network: str = "b", addressee: str = "gw-1"
) -> Candidate:
    address, port = ("127.0.0.1", gateway) if isinstance(gateway, int) else gateway.address
    return Candidate(
        traits=traits, network=network, target="10.1.0.5:8443", address=address, port=port, addressee=addressee
    )


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port where SYNs are dropped."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        with socket.create_connection(server.getsockname()):
            yield server.getsockname()[1]


async def opened(dialing: Upstreams, candidates: list[Candidate], calling: StreamRequest | None = None) -> Connected:
    """Connect, and close the connection."""
    connected = await dialing.connect(calling or call(), candidates)
    connected.stream.close()
    return connected


async def failed(dialing: Upstreams, candidates: list[Candidate]) -> DialError:
    with pytest.raises(DialError) as error:
        await dialing.connect(call(), candidates)
    assert error.value.detail
    return error.value


# --- what a gateway gets --------------------------------------------------------------------------------------------


async def test_the_preamble_says_what_was_asked() -> None:
    async with scripted(opens) as gateway:
        calling = call()
        connected = await opened(upstreams(), [candidate(gateway)], calling)
        assert connected.attempts == 1
        (visit,) = gateway.visits
    preamble = visit.preamble
    assert preamble.stream_id == calling.stream
    assert (preamble.client, preamble.local) == (calling.client, calling.local)
    assert (preamble.authority, preamble.target) == ("orders.shop.example", "10.1.0.5:8443")
    assert (preamble.from_network, preamble.to_network, preamble.addressee) == ("a", "b", "gw-1")
    assert preamble.hello_digest == hashlib.sha256(HELLO[5:]).digest()
    assert abs(preamble.time_ms - time.time() * 1000) < 60_000
    assert not preamble.continues


@pytest.mark.parametrize("size", [100, 7000, 8000, 16_000, 60_000])
async def test_before_ready_one_segment_of_eight_kib_at_most(size: int) -> None:
    """The rest is kept until READY: a TURN server buffers 16 reads before the bind, and drops more."""
    data = client_hello("orders.shop.example", padding(size)) + os.urandom(500)
    done = asyncio.Event()

    async def reads(visit: Visit) -> None:
        await visit.connection.send(Ready())
        assert await visit.payload(len(data)) == data
        done.set()
        await silent(visit)

    async with scripted(reads) as gateway, asyncio.TaskGroup() as group:
        dialing = group.create_task(upstreams().connect(call(data), [candidate(gateway)]))
        async with asyncio.timeout(5):
            await done.wait()
        dialing.cancel()
    first = len(gateway.visits[0].first)
    assert first == MAX_FIRST_WRITE or (first < MAX_FIRST_WRITE and len(data) < MAX_FIRST_WRITE)


async def test_nothing_follows_before_ready() -> None:
    data = client_hello("orders.shop.example", padding(20_000))
    waited = asyncio.Event()

    async def waits(visit: Visit) -> None:
        visit.stream.take_unread()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await visit.stream.recv()
        waited.set()
        visit.stream.reset()

    async with scripted(waits, opens) as gateway:
        await opened(upstreams(), [candidate(gateway)], call(data))
    assert waited.is_set()


# --- before READY ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [reset, ends])
async def test_a_cut_before_ready_is_tried_again(cut: object) -> None:
    """The permission may not have reached the TURN server yet."""
    async with scripted(cut, cut, opens) as gateway:  # type: ignore[arg-type]
        connected = await opened(upstreams(), [candidate(gateway)])
        assert connected.attempts == 3
        assert [visit.preamble.attempt for visit in gateway.visits] == [1, 2, 3]
        assert len({visit.preamble.stream_id for visit in gateway.visits}) == 1


async def test_pauses_grow_and_then_it_is_no_permission() -> None:
    slept: list[float] = []

    async def noting(seconds: float) -> None:
        slept.append(seconds)

    async with scripted(reset) as gateway:
        error = await failed(upstreams(sleep=noting), [candidate(gateway)])
        assert gateway.connections == 1 + len(PAUSES)
    assert slept == list(PAUSES)
    assert error.reason is Reason.NO_PERMISSION
    assert error.attempts == 4
    assert "4 times" in error.detail


async def test_a_direct_gateway_that_cuts_has_no_missing_permission() -> None:
    async with scripted(reset) as gateway, scripted(opens) as second:
        error = await failed(upstreams(), [candidate(gateway, traits=DIRECT)])
        assert (error.reason, gateway.connections) == (Reason.DIAL_FAILED, 1)
        connected = await opened(upstreams(), [candidate(gateway, traits=DIRECT), candidate(second)])
        assert connected.attempts == 2


async def test_after_the_last_reset_the_next_candidate() -> None:
    async with scripted(reset) as first, scripted(opens) as second:
        connected = await opened(upstreams(), [candidate(first), candidate(second)])
        assert connected.attempts == 5
        assert second.visits[0].preamble.attempt == 5
        assert first.visits[0].preamble.stream_id == second.visits[0].preamble.stream_id
        assert connected.candidate.port == second.address[1]


async def test_silence_before_ready_leads_to_the_next_candidate() -> None:
    async with scripted(silent) as first, scripted(opens) as second:
        connected = await opened(upstreams(ready_timeout_s=0.05), [candidate(first), candidate(second)])
        assert connected.attempts == 2
        assert second.visits[0].preamble.attempt == 2
        error = await failed(upstreams(ready_timeout_s=0.05), [candidate(first)])
    assert error.reason is Reason.READY_TIMEOUT


async def test_an_attempt_that_is_given_up_is_cut() -> None:
    """A gateway whose READY comes too late must notice, or it would serve the stream in addition to the next gateway."""
    seen = asyncio.Event()

    async def late(visit: Visit) -> None:
        try:
            while await visit.stream.recv():
                pass
        except ConnectionResetError:
            seen.set()

    async with scripted(late) as first, scripted(opens) as second:
        await opened(upstreams(ready_timeout_s=0.05), [candidate(first), candidate(second)])
        async with asyncio.timeout(5):
            await seen.wait()


@pytest.mark.parametrize("traits", [TURN, DIRECT])
async def test_nobody_listens(traits: Traits) -> None:
    async with scripted(opens) as second:
        connected = await opened(upstreams(), [candidate(closed_port(), traits=traits), candidate(second)])
        assert connected.attempts == 2
    error = await failed(upstreams(), [candidate(closed_port(), traits=traits)])
    assert error.reason is Reason.DIAL_FAILED
    assert "Connection refused" in error.detail


async def test_nobody_answers(dead_port: int) -> None:
    error = await failed(upstreams(dial_timeout_s=0.05), [candidate(dead_port)])
    assert error.reason is Reason.DIAL_FAILED
    assert "no answer in 0.05 s" in error.detail


@pytest.mark.parametrize("reason", ["overloaded", "draining", "clock_skew", "bad_signature", "no_key", "replay"])
async def test_refused_before_ready(reason: str) -> None:
    """Nothing was executed, and another gateway may have the key, the right clock or free capacity."""
    async with scripted(refuses(reason)) as first, scripted(opens) as second:
        connected = await opened(upstreams(), [candidate(first), candidate(second)])
        assert (connected.attempts, first.connections) == (2, 1)
        error = await failed(upstreams(), [candidate(first)])
    assert error.reason.value == reason
    assert "said the test" in error.detail


# --- behind READY ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["dial_failed", "overloaded", "draining", "no_endpoint"])
async def test_a_refusal_that_says_that_nothing_ran_leads_to_the_next_candidate(reason: str) -> None:
    async with scripted(refuses(reason, behind_ready=True)) as first, scripted(opens) as second:
        calling = call()
        connected = await opened(upstreams(), [candidate(first), candidate(second)], calling)
        assert connected.attempts == 2
        assert [visit.preamble.attempt for visit in first.visits + second.visits] == [1, 2]
        assert {visit.preamble.stream_id for visit in first.visits + second.visits} == {calling.stream}


@pytest.mark.parametrize("reason", ["denied", "unknown_name", "bad_hello", "bad_signature", "something_new"])
async def test_any_other_refusal_is_final(reason: str) -> None:
    async with scripted(refuses(reason, behind_ready=True)) as first, scripted(opens) as second:
        error = await failed(upstreams(), [candidate(first), candidate(second)])
        assert second.connections == 0
    assert error.final
    assert error.reason is (Reason.OTHER if reason == "something_new" else Reason(reason))


async def test_silence_after_ready_is_never_retried() -> None:
    """0-RTT data must not be executed twice."""
    async with scripted(silent_behind_ready) as first, scripted(opens) as second:
        error = await failed(upstreams(open_timeout_s=0.05), [candidate(first), candidate(second)])
        assert (first.connections, second.connections) == (1, 0)
    assert (error.reason, error.attempts) == (Reason.OPEN_TIMEOUT, 1)


async def test_a_cut_after_ready_is_never_retried() -> None:
    async with scripted(reset_behind_ready) as first, scripted(opens) as second:
        error = await failed(upstreams(), [candidate(first), candidate(second)])
        assert (first.connections, second.connections) == (1, 0)
    assert error.reason is Reason.TRUNCATED


async def test_a_refusal_is_read_although_sending_the_hello_failed() -> None:
    """A gateway that refuses reads for two seconds. One that closes at once has still sent its reason."""

    async def hasty(visit: Visit) -> None:
        await visit.stream.send(Ready().pack() + Refused("dial_failed", "at once").pack())
        await visit.stream.flushed(5)
        visit.stream.close()  # with unread bytes: a reset

    big = call(client_hello("orders.shop.example", padding(60_000)), os.urandom(300_000))
    async with scripted(hasty) as first, scripted(opens) as second:
        connected = await opened(upstreams(), [candidate(first, traits=DIRECT), candidate(second)], big)
        assert connected.attempts == 2


@pytest.mark.parametrize(
    "wrong",
    [
        Finished().pack(),
        b"\xff" * 32,
        header(CapsuleType.DATA, 5) + b"hello",
        header(CapsuleType.PING, 8) + bytes(8),
        header(CapsuleType.OPENED, 10) + bytes(10),
        header(CapsuleType.REFUSED, 1) + b"\x05",
    ],
)
@pytest.mark.parametrize("behind_ready", [False, True])
async def test_what_is_no_answer_is_a_broken_protocol(wrong: bytes, behind_ready: bool) -> None:
    data = (Ready().pack() if behind_ready else b"") + wrong
    async with scripted(says(data)) as first, scripted(opens) as second:
        error = await failed(upstreams(), [candidate(first), candidate(second)])
        assert second.connections == 0, "who knows what it did with our bytes"
    assert error.reason is Reason.PROTOCOL_ERROR


# --- which candidates -----------------------------------------------------------------------------------------------


async def test_three_candidates_at_most() -> None:
    ports = [closed_port() for _ in range(MAX_CANDIDATES)]
    async with scripted(opens) as fourth:
        error = await failed(upstreams(), [*map(candidate, ports), candidate(fourth)])
        assert fourth.connections == 0
    assert (error.reason, error.attempts) == (Reason.DIAL_FAILED, MAX_CANDIDATES)


async def test_no_candidate_at_all() -> None:
    assert (await failed(upstreams(), [])).reason is Reason.NO_ROUTE


async def test_an_import_reaches_its_next_network_however_many_gateways_the_first_has() -> None:
    async with scripted(opens, network="c") as other:
        first = [candidate(closed_port()) for _ in range(5)]
        connected = await opened(upstreams(), [*first, candidate(other, network="c")])
    assert (connected.attempts, connected.candidate.network) == (3, "c")


async def test_one_network_has_all_three() -> None:
    async with scripted(opens) as third:
        connected = await opened(upstreams(), [*(candidate(closed_port()) for _ in range(2)), candidate(third)])
    assert connected.attempts == 3


async def test_the_last_failure_is_the_one_that_is_told() -> None:
    async with scripted(refuses("overloaded")) as second:
        error = await failed(upstreams(), [candidate(closed_port()), candidate(second)])
    assert (error.reason, error.attempts) == (Reason.OVERLOADED, 2)


async def test_nothing_is_sent_to_a_local_candidate() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connected = await upstreams().connect(call(), [candidate(port, traits=LOCAL)])
        assert (connected.connection, connected.sent) == (None, 0)
        accepted, _ = server.accept()
        accepted.setblocking(False)
        with pytest.raises(BlockingIOError):
            accepted.recv(1)
        accepted.close()
        connected.stream.close()


async def test_a_key_that_was_removed_meanwhile() -> None:
    dialing = upstreams(GatewayConnector("a", SigningKeys({}), now_ms=lambda: 0))
    async with scripted(opens) as gateway:
        error = await failed(dialing, [candidate(gateway)])
        assert gateway.visits == []
    assert error.reason is Reason.NO_KEY


async def test_a_preamble_that_is_too_long_is_a_dial_error() -> None:
    key = SigningKey(id="k" * 250, secret=bytes(32), from_network="a", to_network="b")
    dialing = upstreams(GatewayConnector("a", SigningKeys({"k": key}), now_ms=lambda: 0))
    name = ".".join(["a" * 60] * 4)
    long = call(client_hello(name))
    async with scripted(opens) as gateway:
        asked = Candidate(
            traits=TURN,
            network="b",
            target=f"{name}:8443",
            address=gateway.address[0],
            port=gateway.address[1],
            addressee="a" * 250,
        )
        with pytest.raises(DialError, match="over 1024") as error:
            await dialing.connect(long, [asked])
    assert error.value.final


def wakes(*seconds: int, answers: bool) -> Script:
    """READY, then WAITING for each of `seconds`, then OPENED or nothing."""

    async def script(visit: Visit) -> None:
        await visit.connection.send(Ready())
        for each in seconds:
            await visit.connection.send(Waiting(each))
            await asyncio.sleep(0.15)
        if answers:
            await visit.connection.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
        await asyncio.get_running_loop().create_future()

    return script


async def test_a_service_that_is_being_started_is_waited_for() -> None:
    async with scripted(wakes(1, 1, answers=True)) as gateway:
        assert (await opened(upstreams(open_timeout_s=0.1), [candidate(gateway)])).attempts == 1


@pytest.mark.parametrize("seconds", [(0,), (60, 0), (60, 60, 60)])
async def test_a_service_that_is_being_started_is_not_waited_for_for_ever(seconds: tuple[int, ...]) -> None:
    async with scripted(wakes(*seconds, answers=False)) as first, scripted(opens) as second:
        relay = upstreams(open_timeout_s=0.1, waiting_limit_s=0.2)
        error = await failed(relay, [candidate(first), candidate(second)])
        assert (error.reason, error.final, second.connections) == (Reason.OPEN_TIMEOUT, True, 0)


@pytest.mark.parametrize("script", [silent, silent_behind_ready])
async def test_cancelling_leaves_no_connection(script: object) -> None:
    async with scripted(script) as gateway:  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await upstreams().connect(call(), [candidate(gateway)])
        async with asyncio.timeout(5):
            with pytest.raises((ConnectionResetError, EOFError)):
                while await gateway.visits[0].stream.recv():
                    pass
                raise EOFError


# --- second connections ---------------------------------------------------------------------------------------------


async def test_a_second_connection_continues_the_stream() -> None:
    async with scripted(reset, opens) as gateway:
        calling = call()
        connection = await upstreams().second(calling, candidate(gateway), itertools.count(3))
        preambles = [visit.preamble for visit in gateway.visits]
        connection.stream.close()
    assert [preamble.continues for preamble in preambles] == [True, True]
    assert {preamble.stream_id for preamble in preambles} == {calling.stream}
    assert [preamble.attempt for preamble in preambles] == [3, 4], "none that the first connection had"
    assert all(len(visit.first) < 1024 for visit in gateway.visits), "the preamble goes alone"


@pytest.mark.parametrize("script", [reset, refuses("protocol_error"), silent, says(b"\xff" * 16)])
async def test_without_a_second_connection(script: object) -> None:
    async with scripted(script) as gateway:  # type: ignore[arg-type]
        with pytest.raises(ConnectionError):
            await upstreams(ready_timeout_s=0.05).second(call(), candidate(gateway), itertools.count(3))
