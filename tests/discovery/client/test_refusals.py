"""Requests that servers refuse."""

from typing import Any

import pytest
from yarl import URL

from discovery.client.contract import DiscoveryError
from discovery.client.refusals import Refusals
from discovery.client.servers import RequestRefused
from discovery.model.mesh import Kind, RelaySpec, ServiceSpec, VipSpec
from tests.discovery.client.clients import RELAY, client_of

pytestmark = pytest.mark.anyio


async def test_refusals_are_logged_and_delay_nothing_else(
    serve: Any, run: Any, until: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(tokens_file=tokens.path) as at:
        async with run(client_of(at, network="b", token=tokens["relay-b"])) as client:
            client.publish(Kind.VIP, "v", VipSpec(name="o.s", address="10.200.0.1"))
            client.publish(Kind.RELAY, "r", RELAY, network="c")
            client.publish(Kind.RELAY, "bad", RelaySpec(addresses=["127.0.0.1"], ports=[1]))
            client.publish(Kind.SERVICE, "s", ServiceSpec(name="o.s", ports={"1": ["10.1.0.5:1"] * 90_000}))
            client.publish(Kind.RELAY, "r", RELAY)
            await until(client, lambda mesh: mesh.relays("b"))
            assert not await client.settled(0.01)
            whys = [
                record.event["why"] for record in caplog.records if hasattr(record, "event") and "why" in record.event
            ]
            assert any("may not write vip" in why for why in whys)
            assert any("belongs to network 'b', not 'c'" in why for why in whys)
            assert any("loopback" in why for why in whys)
            assert any("too_large" in why for why in whys)
            for kind, name in ((Kind.VIP, "v"), (Kind.RELAY, "bad"), (Kind.SERVICE, "s")):
                client.withdraw(kind, name)
            with pytest.raises(DiscoveryError) as caught:
                await client.turn_credentials("d")
            assert caught.value.code == "forbidden"
        async with run(client_of(at, token="wrong")) as client:
            client.publish(Kind.RELAY, "r", RELAY)
            assert not await client.settled(0.3)
            assert not client.synced
    assert any("the token is not known here" in str(getattr(record, "event", "")) for record in caplog.records)


def test_a_refusal_is_logged_once_until_it_changes_or_is_cleared(caplog: pytest.LogCaptureFixture) -> None:
    refusals, url = Refusals(), URL("https://10.0.0.1:8600")
    unknown, expired = (RequestRefused(401, "unauthorized", why) for why in ("not known", "expired"))
    for error in (unknown, unknown, expired):
        refusals.note("the watch", url, error)
    assert [record.event["why"] for record in caplog.records] == [str(unknown), str(expired)]  # type: ignore[attr-defined]
    refusals.note("our records", url, RequestRefused(429, "rate_limited", "wait"))
    assert refusals.words() == [f"discovery at {url} refuses the watch: {expired}"]
    refusals.clear("the watch")
    refusals.clear("the watch")
    assert not refusals
    refusals.note("the watch", url, expired)
    assert len(caplog.records) == 3
