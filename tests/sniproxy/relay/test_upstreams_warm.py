"""Opening streams on warm connections: what is sent, and what happens to the stream if the connection is dead."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address

import pytest
from prometheus_client import CollectorRegistry

from sniproxy.relay.upstream_metrics import WARM_LOST
from sniproxy.relay.upstreams import Connected
from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate
from sniproxy.transport.errors import DialError
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.capsules import Payload
from sniproxy.tunnel.connection import CapsuleConnection
from sniproxy.tunnel.messages import Message, Open, Opened, Ping, Pong, Ready, Refused
from sniproxy.tunnel.preamble import Preamble, WarmPreamble
from sniproxy.tunnel.relay_handshake import StreamRequest
from sniproxy.tunnel.state import Side
from sniproxy.tunnel.verify import PreambleVerifier
from tests.support.scripted_gateways import KEY, ScriptedGateway, Visit, opens, scripted, silent
from tests.support.stream_requests import HELLO, call, upstreams
from tests.support.streams import pair

pytestmark = pytest.mark.anyio

OPENED = Opened(IPv4Address("10.1.0.5"), 8443, 1)
Answer = Callable[["Attempt"], Awaitable[object]]


@dataclass
class Attempt:
    """The gateway's end of the warm connection, and what the relay's dialler told."""

    near: CapsuleConnection
    far: CapsuleConnection
    registry: CollectorRegistry
    settled: list[tuple[str, bool]] = field(default_factory=list)
    """Which candidate was found to work, or not to."""
    distrusted: list[str] = field(default_factory=list)
    opening: Preamble | None = None

    @property
    def counted(self) -> set[str]:
        """The results in the metrics."""
        (dials,) = (metric for metric in self.registry._names_to_collectors["crossnet_relay_dials"].collect())
        return {sample.labels["result"] for sample in dials.samples if sample.name.endswith("_total") and sample.value}

    async def arrived(self) -> None:
        """Read PING and OPEN."""
        ping, opening = await self.far.next_message(), await self.far.next_message()
        assert isinstance(ping, Ping)
        assert isinstance(opening, Open)
        verifier = PreambleVerifier({KEY.id: KEY}, "b")
        preamble = verifier.verify(opening.preamble, addressee="gw-1", now_ms=time.time_ns() // 1_000_000)
        assert isinstance(preamble, Preamble)
        self.opening = preamble
        self.token = ping.token

    async def say(self, *messages: Message) -> None:
        for message in messages:
            await self.far.send(message)


class Kept:
    """A pool with one connection."""

    def __init__(self, made: Attempt, ready: CapsuleConnection) -> None:
        self._made, self._ready = made, [ready]

    async def take(self, _candidate: Candidate) -> CapsuleConnection | None:
        return self._ready.pop() if self._ready else None

    def distrust(self, candidate: Candidate) -> None:
        self._made.distrusted.append(candidate.addressee)

    def used(self, candidate: Candidate) -> None:
        pass


class Judged:
    """Notes what is found to work."""

    def __init__(self, made: Attempt) -> None:
        self._made = made

    def succeeded(self, candidate: Candidate) -> None:
        self._made.settled.append((candidate.addressee, True))

    def failed(self, candidate: Candidate) -> None:
        self._made.settled.append((candidate.addressee, False))


def candidate(address: tuple[str, int] = ("127.0.0.1", 1), name: str = "gw-1") -> Candidate:
    return Candidate(
        traits=TURN, network="b", target="10.1.0.5:8443", address=address[0], port=address[1], addressee=name
    )


async def attempt(
    answer: Answer, *cold: ScriptedGateway, calling: StreamRequest | None = None
) -> tuple[Attempt, Connected]:
    """Connect with one warm connection at the first candidate; `cold` are the gateways for new connections to each."""
    near, far = (CapsuleConnection(stream, side) for stream, side in zip(await pair(), Side, strict=True))
    near.ends.warm = far.ends.warm = True
    await far.send(Ready())
    assert await near.next_message() == Ready()
    registry = CollectorRegistry()
    relay = upstreams(registry=registry, ready_timeout_s=0.2, open_timeout_s=0.2)
    made = Attempt(near, far, registry)
    relay.pool, relay.health = Kept(made, near), Judged(made)  # type: ignore[assignment]
    ways = [candidate(gateway.address, f"gw-{number}") for number, gateway in enumerate(cold, 1)] or [candidate()]
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_answer(made, answer))
            connected = await relay.connect(calling or call(), ways)
            connected.stream.close()
            return made, connected
    finally:
        made.near.stream.close()
        made.far.stream.close()


async def _answer(made: Attempt, answer: Answer) -> None:
    await answer(made)


async def failed(answer: Answer, *cold: ScriptedGateway, calling: StreamRequest | None = None) -> DialError:
    with pytest.raises(ExceptionGroup) as caught:
        await attempt(answer, *cold, calling=calling)
    (error,) = caught.value.exceptions
    assert isinstance(error, DialError)
    return error


async def opening(made: Attempt) -> None:
    await made.arrived()
    await made.say(Pong(made.token), OPENED)


async def nothing(made: Attempt) -> None:
    await made.arrived()


async def cut(made: Attempt) -> None:
    made.far.stream.reset()


async def test_ready_means_a_header_without_a_client() -> None:
    async def stand_by(visit: Visit) -> None:
        assert isinstance(visit.began_with, WarmPreamble)
        visit.connection.ends.warm = True
        await visit.connection.send(Ready())

    async with scripted(stand_by) as gateway:
        connection = await upstreams()._warm_up(candidate(gateway.address))
        assert connection.ends.warm
        assert connection.ends.ready
        connection.stream.close()
        for unknown in (
            candidate(),
            Candidate(traits=TURN, network="z", target="", address="127.0.0.1", port=1),
        ):
            with pytest.raises(DialError):
                await upstreams()._warm_up(unknown)


async def test_a_stream_opens_on_a_ready_connection() -> None:
    made, connected = await attempt(opening)
    assert (connected.was_warm, connected.attempts, connected.connection) == (True, 1, made.near)
    assert made.opening is not None
    assert (made.opening.target, made.opening.attempt) == ("10.1.0.5:8443", 1)
    assert made.counted == {"ok"}
    assert made.settled == [("gw-1", True)]


async def payload(far: CapsuleConnection, size: int) -> bytes:
    """Read this much payload."""
    got = b""
    while len(got) < size:
        got += b"".join(bytes(event.data) for event in await far.read() if isinstance(event, Payload))
    return got


async def test_what_is_behind_the_hello_waits_for_an_answer() -> None:
    async def reads(made: Attempt) -> None:
        await made.arrived()
        assert await payload(made.far, len(HELLO)) == HELLO
        await made.say(Pong(made.token))
        assert await payload(made.far, 5) == b"early"
        await made.say(OPENED)

    await attempt(reads, calling=call(behind=b"early"))


@pytest.mark.parametrize("behind", [b"", b"early"])
@pytest.mark.parametrize("answer", [nothing, cut])
async def test_a_dead_warm_connection_costs_an_attempt_and_not_the_stream(answer: Answer, behind: bytes) -> None:
    async with scripted(opens) as gateway:
        calling = call(behind=behind)
        made, connected = await attempt(answer, gateway, calling=calling)
        assert (connected.was_warm, connected.attempts) == (False, 2)
        assert made.counted == {WARM_LOST, "ok"}
        assert made.distrusted == ["gw-1"]
        assert made.settled[-1] == ("gw-1", True), "the allocation works"
        assert made.settled[:-1] == [("gw-1", False)] * (answer is nothing)
        (visit,) = gateway.visits
        assert visit.preamble.attempt == 2
        assert await visit.payload(len(calling.data)) == calling.data


async def test_after_silence_the_next_candidate_comes_first() -> None:
    async with scripted(opens) as first, scripted(opens, addressee="gw-2") as second:
        made, connected = await attempt(nothing, first, second)
        assert (connected.candidate.addressee, connected.attempts) == ("gw-2", 2)
        assert first.connections == 0
        assert made.counted == {WARM_LOST, "ok"}


async def test_after_a_cut_a_new_connection_to_the_same_candidate_comes_first() -> None:
    async with scripted(opens) as first, scripted(opens, addressee="gw-2") as second:
        _, connected = await attempt(cut, first, second)
        assert (connected.candidate.addressee, connected.attempts) == ("gw-1", 2)
        assert second.connections == 0


async def test_silence_of_a_gateway_that_lives_is_final() -> None:
    async def dials_for_ever(made: Attempt) -> None:
        await made.arrived()
        await made.say(Pong(made.token))

    async with scripted(opens) as gateway:
        error = await failed(dials_for_ever, gateway)
        assert (error.reason, error.final) == (Reason.OPEN_TIMEOUT, True)
        assert gateway.connections == 0


@pytest.mark.parametrize(("reason", "asked_next"), [("draining", 1), ("overloaded", 1), ("denied", 0)])
async def test_a_refusal_leads_to_the_next_candidate_if_allowed(reason: str, asked_next: int) -> None:
    async def refuses(made: Attempt) -> None:
        await made.arrived()
        await made.say(Pong(made.token), Refused(reason))

    async with scripted(silent) as first, scripted(opens, addressee="gw-2") as second:
        if asked_next:
            made, connected = await attempt(refuses, first, second)
            assert connected.candidate.addressee == "gw-2"
            assert made.settled == [("gw-1", False), ("gw-2", True)]
        else:
            error = await failed(refuses, first, second)
            assert (error.reason, error.answered) == (Reason.DENIED, True)
        assert (first.connections, second.connections) == (0, asked_next)


async def test_a_wrong_answer_violates_the_protocol() -> None:
    async def opens_without_pong(made: Attempt) -> None:
        await made.arrived()
        await made.say(OPENED)

    error = await failed(opens_without_pong)
    assert (error.reason, error.final) == (Reason.PROTOCOL_ERROR, True)
