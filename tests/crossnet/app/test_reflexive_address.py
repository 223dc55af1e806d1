"""Our address as a TURN server sees it: from a real one, and assumed if none answers."""

from pathlib import Path

import pytest

from crossnet.app.reflexive_address import learn_source
from crossnet.lab.certificates import Authority
from discovery.model.mesh import Kind, Record
from discovery.model.spec import TurnSpec
from turnreg.server.config import TurnServerConfig
from turnreg.server.server import TurnServer

pytestmark = pytest.mark.anyio


def record(url: str, *relay_addresses: str) -> Record[TurnSpec]:
    spec = TurnSpec(url=url, relay_addresses=list(relay_addresses), port_min=1, port_max=2)
    return Record(kind=Kind.TURN, network="a", id="t", revision=1, spec=spec)


def server_config(folder: Path) -> TurnServerConfig:
    certificate = Authority(folder).server("turn", "a TURN server", ["turn.example"])
    return TurnServerConfig(
        listen=(("127.0.0.2", 0),),
        listen_tls=(("127.0.0.2", 0),),
        tls_cert=certificate.certificate,
        tls_key=certificate.key,
        relay_addresses=("127.0.0.2",),
        realm="r",
        secrets=("s",),
    )


async def test_a_turn_server_says_it(tmp_path: Path) -> None:
    async with TurnServer.serving(server_config(tmp_path)) as server:
        port, tls_port = server.addresses[0][1], server.tls_addresses[0][1]
        # Nobody listens on the first address; the URL's own is asked last.
        plain = await learn_source(record(f"turn:127.0.0.2:{port}", "127.0.0.3"))
        # There is no CA for our own TURN server: over plain TCP there is none either.
        secure = await learn_source(record(f"turns:turn.example:{tls_port}", "127.0.0.3", "127.0.0.2"))
    for source in (plain, secure):
        assert source.asked
        assert source.address is not None
        assert source.address.startswith("127.")


async def test_where_none_answers_it_is_assumed_to_be_the_address_that_we_would_come_from() -> None:
    for url in ("turn:127.0.0.1:1", "turns:turn.example:1"):
        source = await learn_source(record(url, "127.0.0.1"))
        assert (source.address, source.asked) == ("127.0.0.1", False)
        assert "127.0.0.1 port 1: connect_failed" in source.detail


async def test_where_no_way_leads_it_is_unknown() -> None:
    source = await learn_source(record("turn:turn.example:1"))
    assert (source.address, source.asked, source.detail) == (None, False, "its record has no address to ask")
    assert (await learn_source(record("nonsense"))).address is None
