"""Epochs at a relay: told the right one it signs again, once, and believes only a gateway with the key."""

import os

import pytest

from sniproxy.streams.end_reason import Reason
from sniproxy.transport.base import Candidate, Traits
from sniproxy.transport.direct import DIRECT
from sniproxy.transport.errors import DialError, StaleEpoch
from sniproxy.transport.turn import TURN
from sniproxy.tunnel.epoch import EPOCH_SIZE, UNKNOWN_EPOCH, proto_of, stale_detail
from sniproxy.tunnel.messages import Refused
from tests.support.scripted_gateways import KEY, Script, ScriptedGateway, Visit, opens, refuses, scripted
from tests.support.stream_requests import call, upstreams

pytestmark = pytest.mark.anyio

EPOCH, NEXT = os.urandom(EPOCH_SIZE), os.urandom(EPOCH_SIZE)


def way(gateway: ScriptedGateway, *, epoch: bytes | None = None, traits: Traits = DIRECT) -> Candidate:
    address, port = gateway.address
    return Candidate(
        traits=traits,
        network="b",
        target="10.1.0.5:8443",
        address=address,
        port=port,
        addressee="gw-1",
        proto=() if epoch is None else (proto_of(epoch),),
    )


def tells(epoch: bytes, key: bytes = KEY.secret, about: bytes = b"") -> Script:
    """Refuse as a gateway of this epoch does."""

    async def script(visit: Visit) -> None:
        detail = stale_detail(epoch, key, about or visit.began_with.once)
        await visit.connection.send(Refused(Reason.STALE_EPOCH, detail))
        await visit.connection.discard()

    return script


def signed(gateway: ScriptedGateway) -> list[bytes | None]:
    return [visit.began_with.epoch for visit in gateway.visits]


async def test_what_a_gateway_tells_is_signed_at_once_and_from_then_on() -> None:
    async with scripted(tells(EPOCH), opens) as gateway:
        relay = upstreams()
        for attempts in (2, 1):
            connected = await relay.connect(call(), [way(gateway)])
            assert connected.attempts == attempts
            connected.stream.close()
        assert signed(gateway) == [UNKNOWN_EPOCH, EPOCH, EPOCH]


async def test_a_record_that_is_newer_than_what_was_told_counts() -> None:
    async with scripted(tells(EPOCH), opens) as gateway:
        relay = upstreams()
        for record in (None, None, NEXT):
            connected = await relay.connect(call(), [way(gateway, epoch=record)])
            connected.stream.close()
        assert signed(gateway) == [UNKNOWN_EPOCH, EPOCH, EPOCH, NEXT]


async def test_it_signs_again_only_once() -> None:
    async with scripted(tells(EPOCH), tells(NEXT), opens) as gateway:
        with pytest.raises(DialError) as failed:
            await upstreams().connect(call(), [way(gateway)])
        assert (failed.value.reason, failed.value.attempts) == (Reason.STALE_EPOCH, 2)


@pytest.mark.parametrize(
    "script",
    [
        tells(EPOCH, key=bytes(32)),
        tells(EPOCH, about=b"another stream"),
        tells(UNKNOWN_EPOCH),
        refuses("stale_epoch"),
        refuses("stale_epoch", detail=""),
    ],
    ids=["another key", "another stream", "the one that was signed", "no epoch", "nothing"],
)
async def test_a_turn_server_cannot_have_a_stream_sent_twice(script: Script) -> None:
    async with scripted(script, opens) as gateway:
        with pytest.raises(DialError) as failed:
            await upstreams().connect(call(), [way(gateway)])
        assert failed.value.reason is Reason.STALE_EPOCH
        assert not isinstance(failed.value, StaleEpoch)
        assert len(gateway.visits) == 1


async def test_a_warm_connection_is_signed_again_too() -> None:
    async with scripted(tells(EPOCH), tells(EPOCH)) as gateway:
        with pytest.raises(DialError):
            await upstreams()._warm_up(way(gateway, traits=TURN))
        assert signed(gateway) == [UNKNOWN_EPOCH, EPOCH]


@pytest.mark.parametrize("reason", ["bad_signature", "clock_skew", "replay", "overloaded", "draining"])
async def test_a_failed_warm_up_says_why(reason: str) -> None:
    async with scripted(refuses(reason)) as gateway:
        with pytest.raises(DialError) as failed:
            await upstreams()._warm_up(way(gateway, traits=TURN))
        assert failed.value.reason == reason
