"""Rules and imports at a relay: every spelling of a target, on local routes and on routes to another network."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from typing import Any

import pytest

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import AnyRecord, Kind, ServiceSpec
from sniproxy.access.rules import Policy, Rule
from sniproxy.engine import SocketStream
from sniproxy.engine.staggered_connect import Endpoint, FirstConnected, connect_first
from sniproxy.tunnel.messages import Opened, Ready
from sniproxy.tunnel.preamble import UNDERSCORES
from tests.support.fixed_discovery import record
from tests.support.hellos import client_hello
from tests.support.relays import ALERT, DOMAIN, Running, a_relay, name_of
from tests.support.scripted_gateways import Visit, scripted
from tests.support.streams import read_all

pytestmark = pytest.mark.anyio

ORDERS = "orders.shop.example"
DB = "db.shop.example"
OWN = Imports([ImportRule(names=("*.shop.example",), sources=("a",))])
FROM_B = Imports([ImportRule(names=(ORDERS,), sources=("b",))])


def names(network: str) -> list[str]:
    """Every way to ask for the service by its name, including upper case and a trailing dot."""
    return [
        ORDERS,
        "Orders.SHOP.example.",
        f"p8443-orders.shop.{network}.{DOMAIN}",
        f"P8443-orders.shop.example.{network}.{DOMAIN}.",
        f"_8443.orders.shop._{network}.{DOMAIN}",
        f"_8443.{ORDERS}._{network}.{DOMAIN}",
    ]


def patterns(network: str) -> list[str]:
    """Every way to name it in a rule."""
    spelt = {name.lower().removesuffix(".") for name in names(network)}
    return [*sorted(spelt), "*.shop.example", "**.example", f"*.shop.{network}.{DOMAIN}"]


def service(name: str, *endpoints: str, network: str = "a") -> AnyRecord:
    return record(Kind.SERVICE, network, name, ServiceSpec(name=name, ports={"8443": list(endpoints)}))


async def echo(stream: SocketStream) -> None:
    while data := await stream.recv():
        await stream.send(data)


async def is_served(running: Running, name: str) -> bool:
    """Whether a client of a local service gets its own ClientHello back; else it has been told access_denied."""
    client = await running.dial(name)
    client.shutdown_write()
    answer = await read_all(client)
    client.close()
    assert answer in (client_hello(name), ALERT["access_denied"])
    return answer == client_hello(name)


async def is_carried(running: Running, name: str) -> bool:
    """Whether a stream to another network is opened; else it has been denied."""
    before = len(running.log.events)
    client = await running.dial(name)
    line = (await running.ended(before + 1))[before]
    client.close()
    assert ("candidate" in line) is (line["reason"] != "denied"), line
    return "candidate" in line


async def opens(visit: Visit) -> None:
    """READY, OPENED, then a reset."""
    await visit.connection.send(Ready())
    await visit.connection.send(Opened(IPv4Address("10.1.0.5"), 8443, 1))
    await visit.stream.flushed(5)
    visit.stream.reset()


@asynccontextmanager
async def local(*rules: Rule, imports: Imports = OWN, **options: Any) -> AsyncIterator[tuple[Running, str, str]]:
    """A relay with two services of its own network, and the address names of both; `options` are for `a_relay`."""
    async with a_relay(policy=Policy(rules), imports=imports, **options) as running:
        orders, db = [await running.serve(echo) for _ in range(2)]
        running.discovery.put(service(ORDERS, f"127.0.0.1:{orders}"), service(DB, f"127.0.0.1:{db}"))
        yield running, name_of(orders), name_of(db)


@asynccontextmanager
async def remote(*rules: Rule, imports: Imports = FROM_B) -> AsyncIterator[Running]:
    """A relay with services of b and c in its mesh, and gateways to both."""
    async with (
        scripted(opens) as b,
        scripted(opens, network="c") as c,
        a_relay(policy=Policy(rules), imports=imports) as running,
    ):
        running.add(b)
        running.add(c, network="c")
        running.discovery.put(*(service(ORDERS, network=network) for network in "bc"), service(DB, network="b"))
        yield running


# --- rules by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", patterns("a"))
async def test_deny_on_local_routes_holds_for_every_name_and_for_addresses(pattern: str) -> None:
    async with local(Rule.parse(action="deny", to=[pattern]), Rule.parse(action="allow")) as (running, address, db):
        mangled = f"_{address[1:].partition('-')[0]}._127-0-0-1._a.{DOMAIN}"
        for name in [*names("a"), address, mangled]:
            assert not await is_served(running, name), name
        if "*" not in pattern:
            assert await is_served(running, DB)
            assert await is_served(running, db)


@pytest.mark.parametrize("pattern", patterns("a"))
async def test_allow_on_local_routes_holds_for_every_name_and_for_no_address(pattern: str) -> None:
    async with local(Rule.parse(action="allow", to=[pattern])) as (running, address, db):
        for name in names("a"):
            assert await is_served(running, name), name
        for name in [address, db, *([] if "*" in pattern else [DB])]:
            assert not await is_served(running, name), name


@pytest.mark.parametrize("pattern", patterns("b"))
@pytest.mark.parametrize("action", ["allow", "deny"])
async def test_rules_for_another_networks_service_hold_for_every_name(pattern: str, action: str) -> None:
    more = [Rule.parse(action="allow")] if action == "deny" else []
    async with remote(Rule.parse(action=action, to=[pattern]), *more) as running:
        for name in names("b"):
            assert await is_carried(running, name) is (action == "allow"), name
        address = name_of(8443, network="b")
        assert await is_carried(running, address) is (action == "deny"), "whose address that is only b knows"
        elsewhere = f"p8443-orders.shop.c.{DOMAIN}"
        if f".{DOMAIN}" in pattern:
            assert await is_carried(running, elsewhere) is (action == "deny"), "a rule with a network is for that one"
        else:
            assert not await is_carried(running, elsewhere), "deny is for all networks, allow for the one imported from"


@pytest.mark.parametrize(
    "rules",
    [
        [{"action": "allow", "to": ["b"], "names": ["service"]}],
        [{"action": "deny", "names": ["address"]}, {"action": "allow"}],
    ],
)
async def test_address_names_are_forbidden_as_such(rules: list[dict[str, str]]) -> None:
    async with remote(*(Rule.parse(**rule) for rule in rules)) as running:
        for name in names("b"):
            assert await is_carried(running, name), name
        assert not await is_carried(running, name_of(8443, network="b"))
        assert not await is_carried(running, f"_8443._127-0-0-1._b.{DOMAIN}")


async def test_an_endpoint_that_was_one_is_still_denied() -> None:
    async with local(Rule.parse(action="deny", to=[ORDERS]), Rule.parse(action="allow")) as (running, address, _):
        assert not await is_served(running, ORDERS)
        running.discovery.remove(Kind.SERVICE, "a", ORDERS)
        assert not await is_served(running, address)


# --- address names and imports --------------------------------------------------------------------------------------


async def test_without_imports_and_rules_an_address_name_leads_anywhere() -> None:
    async with remote(imports=Imports()) as running:
        for network in "bc":
            assert await is_carried(running, name_of(8443, network=network))
    async with local(imports=Imports()) as (running, address, _):
        assert await is_served(running, address)


async def test_address_names_need_an_import_from_their_network_or_a_rule() -> None:
    async with remote() as running:
        assert await is_carried(running, name_of(8443, network="b"))
        assert not await is_carried(running, name_of(8443, network="c"))
        detail = str(running.log.events[-1]["detail"])
        assert "address name of network 'c', from which nothing is imported" in detail
        assert "{to: [c], names: [address], action: allow}" in detail
    async with remote(Rule.parse(action="allow", to=["c"], names=["address"])) as running:
        assert await is_carried(running, name_of(8443, network="c"))
        assert not await is_carried(running, name_of(8443, network="b"))


@pytest.mark.parametrize("behind_rules", [False, True])
async def test_the_gateway_is_told_what_is_imported_unless_rules_let_addresses_be_reached(behind_rules: bool) -> None:
    imports = Imports(
        [
            ImportRule(names=(ORDERS, "*.pay.example"), sources=("c", "b")),
            ImportRule(names=(DB,), sources=("c",)),
            ImportRule(names=("stock.shop.example",), sources=("b",)),
        ]
    )
    rules = [Rule.parse(action="allow", to=["b"])] if behind_rules else []
    async with scripted(opens) as gateway, a_relay(policy=Policy(tuple(rules)), imports=imports) as running:
        running.add(gateway)
        running.discovery.put(service(ORDERS, network="b"))
        assert await is_carried(running, name_of(8443, network="b"))
        assert await is_carried(running, f"p8443-orders.shop.b.{DOMAIN}")
        told = [visit.preamble.imports for visit in gateway.visits]
        assert told == [None if behind_rules else f"{ORDERS} *.pay.example stock.shop.example", None]


@pytest.mark.parametrize("knows", [False, True])
async def test_an_older_gateway_is_not_told_of_names_with_underscores(knows: bool) -> None:
    imports = Imports([ImportRule(names=("foo_bar.shop.example", ORDERS, "a_b.*"), sources=("b",))])
    async with scripted(opens) as gateway, a_relay(imports=imports) as running:
        running.add(gateway, proto=[UNDERSCORES] if knows else [])
        assert await is_carried(running, name_of(8443, network="b"))
    assert gateway.visits[0].preamble.imports == (f"foo_bar.shop.example {ORDERS} a_b.*" if knows else ORDERS)


async def test_more_imports_than_the_gateway_can_be_told() -> None:
    many = Imports([ImportRule(names=tuple(f"s{number}.shop.example" for number in range(100)), sources=("b",))])
    async with remote(imports=many) as running:
        assert not await is_carried(running, name_of(8443, network="b"))
        assert "too many to tell its gateway" in str(running.log.events[-1]["detail"])


async def test_on_local_routes_an_address_of_a_service_needs_its_import_or_a_rule() -> None:
    only_orders = Imports([ImportRule(names=(ORDERS,), sources=("a",))])
    async with local(imports=only_orders) as (running, orders, db):
        assert await is_served(running, orders)
        assert not await is_served(running, db)
        assert f"address name of service {DB!r}, which is not imported" in str(running.log.events[-1]["detail"])
        nobodys = name_of(await running.serve(echo))
        assert await is_served(running, nobodys), "deliver lists it, and it belongs to no service"
        port = db.partition("-")[0].removeprefix("p")
        running.discovery.put(service(ORDERS, f"127.0.0.1:{port}"))
        assert await is_served(running, db), "it is an endpoint of what is imported, too"
    async with local(Rule.parse(action="allow", to=["127.0.0.0/8"]), imports=only_orders) as (running, _, db):
        assert await is_served(running, db)


# --- what is not known ----------------------------------------------------------------------------------------------


async def test_without_a_view_of_discovery() -> None:
    async with local(Rule.parse(action="deny", to=[ORDERS]), Rule.parse(action="allow")) as (running, _, db):
        running.discovery.synced = False
        for name in (db, f"p1-127-0-0-1.nowhere.{DOMAIN}"):
            client = await running.dial(name)
            assert await read_all(client) == ALERT["internal_error"]
            client.close()
        assert [line["reason"] for line in await running.ended(2)] == ["no_view"] * 2


async def test_rules_that_change_while_a_local_service_is_dialled() -> None:
    async def late(endpoints: Iterator[Endpoint], **limits: Any) -> FirstConnected | None:
        connected = await connect_first(endpoints, **limits)
        running.discovery.put(service(ORDERS, "127.0.0.1:1"))
        return connected

    allow = Rule.parse(action="allow", to=[ORDERS])
    async with local(allow, dial=late) as (running, _, _):
        assert not await is_served(running, ORDERS)
        assert (await running.ended())[0]["reason"] == "denied"
