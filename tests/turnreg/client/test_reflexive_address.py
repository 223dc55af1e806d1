"""The mapped address, from real servers and from bad ones."""

import asyncio

import pytest

from tests.support.scripted_turn import Answer, error, scripted
from tests.support.turn_servers import BOTH, turn_server
from turnreg.client.control_connection import TurnError, TurnReason
from turnreg.client.reflexive_address import mapped_address
from turnreg.stun.message import Attribute, Message, Method

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_real_servers(kind: str, address: str) -> None:
    with turn_server(kind, address=address) as server:
        assert await mapped_address(server.address, server.port) == address


def mapped(request: Message) -> bytes:
    return request.success().with_xor_address(Attribute.XOR_MAPPED_ADDRESS, ("192.0.2.7", 5)).pack()


async def test_what_is_no_answer_is_passed_over() -> None:
    other = Message(Method.BINDING, 2, bytes(12)).pack()  # type: ignore[arg-type]
    async with scripted({Method.BINDING: [lambda request: other + other + mapped(request)]}) as server:
        assert await mapped_address(server.address, server.port, 5.0) == "192.0.2.7"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: b"", TurnReason.TIMEOUT),
        (lambda request: mapped(request)[:25], TurnReason.TIMEOUT),
        (lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n", TurnReason.MALFORMED),
        (lambda request: request.success().pack(), TurnReason.BAD_ANSWER),
        (lambda request: Message(request.method, 2, bytes(12)).pack() * 20, TurnReason.BAD_ANSWER),  # type: ignore[arg-type]
        (error(500), TurnReason.REJECTED),
        (error(300), TurnReason.REDIRECTED),
    ],
)
async def test_bad_servers(answer: Answer, reason: TurnReason) -> None:
    async with scripted({Method.BINDING: [answer]}) as server:
        with pytest.raises(TurnError) as raised:
            await mapped_address(server.address, server.port, 0.2)
        assert raised.value.reason is reason


async def test_a_server_that_hangs_up() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        with pytest.raises(TurnError) as raised:
            await mapped_address(*server.sockets[0].getsockname())
        assert raised.value.reason is TurnReason.CONNECTION_LOST


async def test_no_server() -> None:
    with pytest.raises(TurnError) as raised:
        await mapped_address("127.0.0.1", 1)
    assert raised.value.reason is TurnReason.CONNECT_FAILED
