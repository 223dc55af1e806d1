"""Our address as a TURN server sees it, found by a STUN Binding over TCP (RFC 8489, section 7.2.2)."""

import asyncio

from sniproxy.engine import connect
from turnreg.client.allocation import Dial
from turnreg.client.control_connection import TurnError, TurnReason, describe, read_message, request
from turnreg.stun.message import Attribute, MessageClass, Method, StunError

MAX_OTHER_MESSAGES = 16
"""How many other messages are read before we stop waiting for the answer."""


async def mapped_address(address: str, port: int, timeout_s: float = 5.0, dial: Dial = connect) -> str:
    """Return our IP address as the STUN server at this IP address sees it, over a new TCP connection.

    A permission on that server must name this address. Binding needs no credentials. Takes at most `timeout_s` in all. `dial` makes
    the connection, for instance over TLS.

    Raises:
        TurnError: no connection, no answer, or an answer without the address.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _ask(address, port, timeout_s, dial)
    except TimeoutError:
        raise TurnError(TurnReason.TIMEOUT, f"no answer to BINDING within {timeout_s:g} s") from None
    except EOFError as exc:
        raise TurnError(TurnReason.CONNECTION_LOST, "the server closed the connection") from exc
    except OSError as exc:
        raise TurnError(TurnReason.CONNECTION_LOST, describe(exc)) from exc
    except StunError as exc:
        raise TurnError(TurnReason.MALFORMED, str(exc)) from exc


async def _ask(address: str, port: int, timeout_s: float, dial: Dial) -> str:
    try:
        stream = await dial(address, port, timeout_s=timeout_s)
    except TimeoutError:
        raise
    except OSError as exc:
        raise TurnError(TurnReason.CONNECT_FAILED, describe(exc)) from exc
    try:
        question = request(Method.BINDING)
        await stream.send(question.pack())
        for _ in range(MAX_OTHER_MESSAGES):
            answer = await read_message(stream)
            if answer.transaction_id != question.transaction_id or answer.method != Method.BINDING:
                continue
            if answer.message_class is not MessageClass.SUCCESS:
                raise TurnError.of_answer(answer)
            mapped = answer.xor_address(Attribute.XOR_MAPPED_ADDRESS)
            if mapped is None:
                raise TurnError(TurnReason.BAD_ANSWER, "the answer has no XOR-MAPPED-ADDRESS")
            return mapped[0]
        raise TurnError(TurnReason.BAD_ANSWER, f"{MAX_OTHER_MESSAGES} messages came, none of them the answer")
    finally:
        stream.close()
