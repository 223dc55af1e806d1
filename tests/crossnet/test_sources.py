"""The address that a TURN server sees us come from, asked of a real one, and guessed where none answers."""

import pytest

from crossnet.sources import learn_source
from discovery.model import Kind, Record
from discovery.spec import TurnSpec
from turnreg.server.config import TurnServerConfig
from turnreg.server.server import TurnServer

pytestmark = pytest.mark.anyio


def record(url: str, *relay_addresses: str) -> Record[TurnSpec]:
    spec = TurnSpec(url=url, relay_addresses=list(relay_addresses), port_min=1, port_max=2)
    return Record(kind=Kind.TURN, network="a", id="t", revision=1, spec=spec)


async def test_a_turn_server_says_it() -> None:
    config = TurnServerConfig(listen=(("127.0.0.2", 0),), relay_addresses=("127.0.0.2",), realm="r", secrets=("s",))
    async with TurnServer.serving(config) as server:
        port = server.addresses[0][1]
        # The first address has nobody; the URL's own is asked last.
        source = await learn_source(record(f"turn:127.0.0.2:{port}", "127.0.0.3"))
    assert source is not None
    assert source.startswith("127.")


async def test_where_none_answers_it_is_the_address_that_we_would_come_from() -> None:
    assert await learn_source(record("turn:127.0.0.1:1", "127.0.0.1")) == "127.0.0.1"
    assert await learn_source(record("turns:turn.example:1", "127.0.0.1")) == "127.0.0.1"


async def test_where_no_way_leads_it_is_unknown() -> None:
    assert await learn_source(record("turn:turn.example:1")) is None
    assert await learn_source(record("nonsense")) is None
