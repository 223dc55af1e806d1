"""Conversations of the relay's handshake, without sockets: one for each way in which it can go.

play(a_stream()) >> send(preamble=HEADER, data=HELLO) >> reply(Ready()) >> reply(OPENED) >> established
                    what it must do next                what the gateway does          how it must end
"""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from sniproxy.streams.end_reason import RETRYABLE, Reason
from sniproxy.transport.base import MAX_FIRST_WRITE, Candidate
from sniproxy.transport.errors import DialError, ResetBeforeReady, StaleEpoch, WarmLost
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.capsules import HEADER_SIZE, CapsuleError, CapsuleFlood
from sniproxy.tunnel.epoch import UNKNOWN_EPOCH, stale_detail
from sniproxy.tunnel.handshake import (
    Established,
    Failed,
    RelayHandshake,
    Send,
    Signed,
    Step,
    Timing,
    Wait,
    greeting,
    opening,
    opening_on_warm,
)
from sniproxy.tunnel.messages import Finished, Message, Open, Opened, Ping, Pong, Ready, Refused, Waiting
from sniproxy.tunnel.preamble import Preamble, WarmPreamble, sign
from tests.support.hellos import EARLY_DATA, client_hello
from tests.support.scripted_gateways import KEY

CANDIDATE = Candidate(
    traits=TURN, network="b", target="10.1.0.5:8443", address="127.0.0.1", port=1, addressee="alloc-1"
)
TIMING = Timing(ready_s=3.0, opened_s=10.0, waiting_s=120.0)
EPOCH, NEXT = bytes(range(16)), bytes(range(16, 32))
PREAMBLE = Preamble(
    client=("10.0.0.77", 40000),
    local=("10.0.0.9", 443),
    authority="orders.shop.example",
    stream_id=bytes(range(16)),
    from_network="a",
    to_network="b",
    addressee="alloc-1",
    key_id=KEY.id,
    time_ms=1_800_000_000_000,
    target="10.1.0.5:8443",
    hello_digest=bytes(32),
    attempt=1,
    epoch=EPOCH,
)
WARM = WarmPreamble(
    nonce=bytes(16), from_network="a", to_network="b", addressee="alloc-1", key_id=KEY.id, time_ms=1, epoch=EPOCH
)
HEADER = sign(PREAMBLE, KEY.secret)
HELLO = client_hello("orders.shop.example")
TOKEN = b"12345678"
OPENED = Opened(IPv4Address("10.1.0.5"), 8443, 1)
BEGAN = 1000.0


def a_stream(data: bytes = HELLO) -> RelayHandshake:
    return opening(CANDIDATE, Signed(PREAMBLE, HEADER, KEY.secret), TIMING, data)


def on_warm(rest: bytes = b"") -> RelayHandshake:
    return opening_on_warm(CANDIDATE, Signed(PREAMBLE, HEADER, KEY.secret), TIMING, HELLO, rest, token=TOKEN)


def to_keep_warm() -> RelayHandshake:
    return greeting(CANDIDATE, Signed(WARM, sign(WARM, KEY.secret), KEY.secret), TIMING)


def a_second_connection() -> RelayHandshake:
    preamble = replace(PREAMBLE, continues=True, attempt=2)
    return greeting(CANDIDATE, Signed(preamble, sign(preamble, KEY.secret), KEY.secret), TIMING)


class Play:
    """A conversation: `>>` has one line after the other."""

    def __init__(self, handshake: RelayHandshake) -> None:
        self.handshake = handshake
        self.now = BEGAN
        self.step: Step = handshake.start(self.now)

    def __rshift__(self, line: Callable[["Play"], None]) -> "Play":
        line(self)
        return self

    @property
    def waiting(self) -> Wait:
        assert isinstance(self.step, Wait), f"it has ended: {self.step}"
        return self.step


Line = Callable[[Play], None]


def play(handshake: RelayHandshake, *lines: Line) -> Play:
    """Begin a conversation, with these lines if they stand for themselves."""
    said = Play(handshake)
    for line in lines:
        said = said >> line
    return said


# What it must do


def send(*messages: Message, preamble: bytes = b"", data: bytes = b"") -> Line:
    """Check that the step sends this in one write."""

    def line(said: Play) -> None:
        assert said.waiting.send == Send(preamble, messages, data)

    return line


def nothing(said: Play) -> None:
    """Check that the step sends nothing."""
    assert said.waiting.send is None


def until(seconds: float) -> Line:
    """Check that the step waits until this long after the start."""

    def line(said: Play) -> None:
        assert said.waiting.until == BEGAN + seconds

    return line


def established(said: Play) -> None:
    assert said.step == Established()


def fails(
    kind: type[DialError | ResetBeforeReady | WarmLost], reason: Reason | None = None, *, final: bool = False
) -> Line:
    """Check that the step has failed with exactly this type of error."""

    def line(said: Play) -> None:
        assert isinstance(said.step, Failed)
        error = said.step.error
        assert type(error) is kind
        assert str(error)
        if isinstance(error, DialError):
            assert (error.reason, error.final) == (reason, final)

    return line


# What happens


def after(seconds: float) -> Line:
    def line(said: Play) -> None:
        said.now += seconds

    return line


def reply(message: Message) -> Line:
    def line(said: Play) -> None:
        assert said.waiting
        said.step = said.handshake.heard(message, said.now)

    return line


def refused(reason: str, detail: str = "because") -> Line:
    return reply(Refused(reason, detail))


def cut(said: Play) -> None:
    assert said.waiting
    said.step = said.handshake.cut()


def silence(said: Play) -> None:
    said.now = said.waiting.until
    said.step = said.handshake.silent()


def broken(error: CapsuleError) -> Line:
    def line(said: Play) -> None:
        assert said.waiting
        said.step = said.handshake.broken(error)

    return line


NOT_READY = CapsuleError("DATA: before READY")

BEGINNINGS: dict[str, tuple[Callable[[], RelayHandshake], Message]] = {
    "stream": (a_stream, Ready()),
    "warm": (on_warm, Pong(TOKEN)),
}
"""The two ways to open a stream, and the answer after which the gateway may deliver."""

BOTH = pytest.mark.parametrize(("begin", "answer"), BEGINNINGS.values(), ids=BEGINNINGS)
GREETINGS = pytest.mark.parametrize("begin", [to_keep_warm, a_second_connection])

# --- it goes well -----------------------------------------------------------------------------------------------------


def test_a_stream_opens() -> None:
    play(
        a_stream(),
        send(preamble=HEADER, data=HELLO),
        until(3),
        after(1),
        reply(Ready()),
        nothing,
        until(1 + 10),
        after(9),
        reply(OPENED),
        established,
    )


@pytest.mark.parametrize("size", [1, 7000, 8192, 20_000])
def test_what_is_over_the_first_write_follows_ready(size: int) -> None:
    data = bytes(size)
    room = MAX_FIRST_WRITE - len(HEADER) - HEADER_SIZE
    begun = play(a_stream(data), send(preamble=HEADER, data=data[:room]), reply(Ready()))
    rest = data[room:]
    begun >> (send(data=rest) if rest else nothing) >> reply(OPENED) >> established


def test_a_stream_opens_on_a_warm_connection() -> None:
    """The data behind the ClientHello may be early data, and is sent once."""
    begun = play(on_warm(EARLY_DATA)) >> send(Ping(TOKEN), Open(HEADER), data=HELLO) >> until(3) >> after(1)
    begun >> reply(Pong(TOKEN)) >> send(data=EARLY_DATA) >> until(1 + 10) >> reply(OPENED) >> established


@GREETINGS
def test_a_preamble_goes_alone_and_ready_is_all(begin: Callable[[], RelayHandshake]) -> None:
    begun = play(begin(), until(3))
    assert begun.waiting.send is not None
    assert begun.waiting.send.preamble
    assert not begun.waiting.send.data
    begun >> reply(Ready()) >> established


# --- before anything was answered -------------------------------------------------------------------------------------


def test_cut_before_ready() -> None:
    play(a_stream(), cut, fails(ResetBeforeReady))


def test_silence_before_ready() -> None:
    play(a_stream(), silence, fails(DialError, Reason.READY_TIMEOUT))


@pytest.mark.parametrize("reason", ["overloaded", "denied", "bad_signature", "clock_skew", "replay", "draining"])
def test_refused_before_ready(reason: str) -> None:
    """Whatever the reason: nothing was delivered."""
    play(a_stream(), refused(reason), fails(DialError, Reason(reason)))


def test_a_warm_connection_is_dead() -> None:
    for line, silent in ((cut, False), (silence, True)):
        said = play(on_warm(), line, fails(WarmLost))
        assert isinstance(said.step, Failed)
        assert isinstance(said.step.error, WarmLost)
        assert said.step.error.silent is silent


@GREETINGS
def test_a_greeting_fails(begin: Callable[[], RelayHandshake]) -> None:
    play(begin(), cut, fails(ResetBeforeReady))
    play(begin(), silence, fails(DialError, Reason.READY_TIMEOUT))
    play(begin(), refused("overloaded"), fails(DialError, Reason.OVERLOADED))
    play(begin(), refused("protocol_error"), fails(DialError, Reason.PROTOCOL_ERROR))
    play(begin(), broken(NOT_READY), fails(DialError, Reason.PROTOCOL_ERROR, final=True))
    play(begin(), reply(OPENED), fails(DialError, Reason.PROTOCOL_ERROR, final=True))


# --- another epoch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [a_stream, on_warm])
def test_the_gateway_proves_another_epoch(begin: Callable[[], RelayHandshake]) -> None:
    proof = stale_detail(NEXT, KEY.secret, PREAMBLE.once)
    said = play(begin(), refused("stale_epoch", proof), fails(StaleEpoch, Reason.STALE_EPOCH))
    assert said.handshake.told == NEXT


def test_a_warm_gateway_answers_the_ping_first() -> None:
    proof = stale_detail(NEXT, KEY.secret, PREAMBLE.once)
    said = play(on_warm(), reply(Pong(TOKEN)), refused("stale_epoch", proof), fails(StaleEpoch, Reason.STALE_EPOCH))
    assert said.handshake.told == NEXT


def test_a_gateway_that_has_sent_ready_never_gets_the_stream_twice() -> None:
    proof = stale_detail(NEXT, KEY.secret, PREAMBLE.once)
    said = play(
        a_stream(),
        reply(Ready()),
        refused("stale_epoch", proof),
        fails(DialError, Reason.STALE_EPOCH, final=True),
    )
    assert said.handshake.told is None


@pytest.mark.parametrize(
    "detail",
    [
        stale_detail(NEXT, bytes(32), PREAMBLE.once),
        stale_detail(NEXT, KEY.secret, b"another stream"),
        stale_detail(EPOCH, KEY.secret, PREAMBLE.once),
        "signed without an epoch",
        "",
    ],
    ids=["another key", "another stream", "the one that was signed", "no epoch", "nothing"],
)
def test_an_epoch_without_proof(detail: str) -> None:
    said = play(a_stream(), refused("stale_epoch", detail), fails(DialError, Reason.STALE_EPOCH))
    assert said.handshake.told is None


def test_a_warm_up_learns_the_epoch_too() -> None:
    preamble = replace(WARM, epoch=UNKNOWN_EPOCH)
    begun = play(greeting(CANDIDATE, Signed(preamble, sign(preamble, KEY.secret), KEY.secret), TIMING))
    said = begun >> refused("stale_epoch", stale_detail(EPOCH, KEY.secret, preamble.once))
    said >> fails(StaleEpoch, Reason.STALE_EPOCH)
    assert said.handshake.told == EPOCH


# --- after the first answer -------------------------------------------------------------------------------------------


@BOTH
def test_cut_while_opening(begin: Callable[[], RelayHandshake], answer: Message) -> None:
    play(begin(), reply(answer), cut, fails(DialError, Reason.TRUNCATED, final=True))


@BOTH
def test_silence_while_opening(begin: Callable[[], RelayHandshake], answer: Message) -> None:
    play(begin(), reply(answer), silence, fails(DialError, Reason.OPEN_TIMEOUT, final=True))


@BOTH
@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.STALE_EPOCH])
def test_refused_while_opening(begin: Callable[[], RelayHandshake], answer: Message, reason: Reason) -> None:
    """Only some reasons guarantee that nothing was delivered."""
    said = play(begin(), reply(answer), refused(reason), fails(DialError, reason, final=reason not in RETRYABLE))
    assert isinstance(said.step, Failed)
    assert isinstance(said.step.error, DialError)
    assert said.step.error.answered
    assert said.step.error.said == "because"


@BOTH
def test_a_reason_of_a_later_version_is_final(begin: Callable[[], RelayHandshake], answer: Message) -> None:
    play(begin(), reply(answer), refused("something_new"), fails(DialError, Reason.OTHER, final=True))


@pytest.mark.parametrize("reason", ["draining", "denied"])
def test_refused_in_place_of_pong(reason: str) -> None:
    """OPEN and the ClientHello may have arrived."""
    play(on_warm(), refused(reason), fails(DialError, Reason(reason), final=reason == "denied"))


# --- a broken protocol ------------------------------------------------------------------------------------------------


@BOTH
def test_a_broken_protocol_is_always_final(begin: Callable[[], RelayHandshake], answer: Message) -> None:
    """READY may have come in the same read."""
    for before in ([], [reply(answer)]):
        play(begin(), *before, broken(NOT_READY), fails(DialError, Reason.PROTOCOL_ERROR, final=True))
        play(begin(), *before, broken(CapsuleFlood("PONG")), fails(DialError, Reason.FLOOD, final=True))


@BOTH
@pytest.mark.parametrize("wrong", [Finished(), Ping(TOKEN)])
def test_an_unexpected_message(begin: Callable[[], RelayHandshake], answer: Message, wrong: Message) -> None:
    for before in ([], [reply(answer)]):
        play(begin(), *before, reply(wrong), fails(DialError, Reason.PROTOCOL_ERROR, final=True))
    play(begin(), reply(answer), reply(answer), fails(DialError, Reason.PROTOCOL_ERROR, final=True))


# --- services that are being woken ------------------------------------------------------------------------------------


@BOTH
def test_a_service_is_woken(begin: Callable[[], RelayHandshake], answer: Message) -> None:
    begun = play(begin(), reply(answer), until(10), after(1), reply(Waiting(30)), nothing, until(1 + 30 + 10))
    begun >> after(25) >> reply(Waiting(20)) >> until(26 + 20 + 10) >> after(29) >> reply(OPENED) >> established


def test_a_service_does_not_wake() -> None:
    begun = play(a_stream(), reply(Ready()), reply(Waiting(30)))
    begun >> silence >> fails(DialError, Reason.OPEN_TIMEOUT, final=True)


def test_waiting_has_an_end() -> None:
    begun = play(a_stream(), after(2), reply(Ready()), after(100), reply(Waiting(0xFFFF)), until(2 + 120 + 10))
    begun >> after(20) >> reply(Waiting(60)) >> until(2 + 120 + 10)


def test_a_gateway_may_shorten_its_waiting() -> None:
    play(a_stream(), reply(Ready()), reply(Waiting(60)), after(1), reply(Waiting(0)), until(1 + 10))


def test_a_warm_gateway_that_waits_before_pong_has_only_that_long() -> None:
    play(on_warm(), reply(Waiting(5)), until(5 + 3), silence, fails(WarmLost))
