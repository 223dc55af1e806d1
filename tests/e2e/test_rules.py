"""Rules at the relay and at the gateway, changed while streams are open."""

from dataclasses import replace

import pytest

from sniproxy.access.rules import Policy, Rule
from sniproxy.engine import SocketStream
from sniproxy.relay.relay import Relay
from sniproxy.tunnel.keys import SigningKeys
from sniproxy.tunnel.preamble import SigningKey
from tests.support.hellos import client_hello
from tests.support.path import DOMAIN, Path, a_path, name_of
from tests.support.streams import read_all

pytestmark = pytest.mark.anyio

ACCESS_DENIED = bytes.fromhex("15030300020231")


async def echo(stream: SocketStream) -> None:
    while data := await stream.recv():
        await stream.send(data)


def relay_rules(path: Path, *rules: Rule) -> None:
    keys = path.relay._router.keys
    path.relay.reconfigure(replace(path.relay.config, policy=Policy(rules)), keys)


def gateway_rules(path: Path, *rules: Rule) -> None:
    keys = path.gateway._handshakes.keys
    path.gateway.reconfigure(replace(path.gateway.config, policy=Policy(rules)), keys)


async def answer(path: Path, name: str) -> bytes:
    """Send a ClientHello and end. Returns what comes back."""
    client = await path.dial(name)
    client.shutdown_write()
    answer = await read_all(client)
    client.close()
    return answer


@pytest.mark.parametrize(
    ("rule", "served"),
    [
        ({"to": ["b"]}, True),
        ({"to": ["c"]}, False),
        ({"sources": ["127.0.0.0/8"], "to": [f"*.b.{DOMAIN}"]}, True),
        ({"sources": ["127.0.0.2"]}, False),
        ({"to": ["127.0.0.0/8"]}, True),
        ({"to": ["127.0.0.0/8:1"]}, False),
        ({"ports": ["1-1023"]}, False),
        ({"sources": ["a"]}, True),
        ({"sources": ["c"]}, False),
    ],
)
@pytest.mark.parametrize("where", [relay_rules, gateway_rules])
async def test_a_stream_goes_where_a_rule_allows_it(where, rule, served: bool) -> None:  # type: ignore[no-untyped-def]
    # In a gateway's rule, a network in `to` is the stream's destination, which is the gateway's own network.
    async with a_path("direct") as path:
        name = name_of(await path.serve(echo))
        where(path, Rule.parse(action="allow", **rule))
        assert await answer(path, name) == (client_hello(name) if served else ACCESS_DENIED)
        relay, _ = await path.ended(1) if where is gateway_rules or served else (path.relay_log.events, [])
        assert relay[0]["reason"] == ("ok" if served else "denied")
        if not served:
            role = "relay" if where is relay_rules else "gateway"
            assert f"{role}.rules: no rule allows it" in str(relay[0]["detail"])


async def test_the_denying_rule_is_named_and_other_streams_continue() -> None:
    async with a_path("direct") as path:
        name = name_of(await path.serve(echo))
        held = await path.dial(name)
        await held.recv_exactly(len(client_hello(name)))
        relay_rules(path, Rule.parse(action="allow", to=["c"]), Rule.parse(action="deny", to=["b"]))
        assert await answer(path, name) == ACCESS_DENIED
        assert "rule 2 denies it" in str(path.relay_log.events[0]["detail"])
        await held.send(b"still here")
        assert await held.recv_exactly(10) == b"still here"
        relay_rules(path)
        assert await answer(path, name) == client_hello(name)
        held.close()


async def test_keys_are_rotated_while_streams_are_open() -> None:
    """The gateway learns the new key first, then the relay signs with it, then the old one goes."""
    async with a_path("direct") as path:
        name = name_of(await path.serve(echo))
        held = await path.dial(name)
        await held.recv_exactly(len(client_hello(name)))
        old = path.gateway._handshakes.keys["ab-1"]
        new = SigningKey(id="ab-2", secret=bytes(range(32)), from_network="a", to_network="b")
        for gateway_keys, relay_key in (([old, new], old), ([old, new], new), ([new], new)):
            path.gateway.reconfigure(path.gateway.config, {key.id: key for key in gateway_keys})
            relay: Relay = path.relay
            relay.reconfigure(relay.config, SigningKeys({relay_key.id: relay_key}))
            assert await answer(path, name) == client_hello(name)
        relay.reconfigure(relay.config, SigningKeys({old.id: old}))
        assert (await answer(path, name))[-1] == 80
        await held.send(b"still here")
        assert await held.recv_exactly(10) == b"still here"
        held.close()
        _, gateway = await path.ended(5)
    assert {line.get("key_id") for line in gateway} >= {"ab-1", "ab-2"}
