"""Names and targets at a gateway: a relay with a key reaches only the target of the name that it signed."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from discovery.model.addresses import TargetList
from discovery.model.mesh import AnyRecord, Kind, NetworkSpec, ServiceSpec
from sniproxy.access.name_pattern import NamePattern
from sniproxy.access.rules import Policy, Rule
from sniproxy.engine import Listener, SocketStream
from sniproxy.engine.staggered_connect import Endpoint, FirstConnected, connect_first
from tests.support.fixed_discovery import record
from tests.support.gateways import Running, Service, Visit, a_gateway
from tests.support.hellos import client_hello
from tests.support.preambles import address_name, preamble
from turnreg.gateway.activation import ActivationRule
from turnreg.gateway.activation_trigger import Command

pytestmark = pytest.mark.anyio

D = "svc.mesh.internal"
ORDERS = "orders.shop.example"
DB = "db.shop.example"
NAMES = [
    ORDERS,
    f"p8443-orders.shop.b.{D}",
    f"p8443-{ORDERS}.b.{D}",
    f"_8443.orders.shop._b.{D}",
    f"_8443.{ORDERS}._b.{D}",
]
"""All names of the service, in the form in which a ClientHello is read: lower case, without trailing dot."""


def known(name: str, *endpoints: str, id: str = "") -> AnyRecord:  # noqa: A002 - the record's own word
    return record(Kind.SERVICE, "b", id or name, ServiceSpec(name=name, ports={"8443": list(endpoints)}))


@asynccontextmanager
async def gateway_of_two(*rules: Rule, **config: object) -> AsyncIterator[tuple[Running, Service, Service]]:
    """Run a gateway with two services, the second of which must not be reached."""
    async with a_gateway(policy=Policy(rules), **config) as running:  # type: ignore[arg-type]
        yield running, await running.service(), await running.service(DB)


async def asks(running: Running, name: str, target: str, sni: str | None = None) -> Visit:
    hello = client_hello(sni or name)
    return await running.visit(preamble(target, hello, authority=name), hello)


async def refused(running: Running, name: str, target: str, sni: str | None = None) -> tuple[str, str]:
    answer = await (await asks(running, name, target, sni)).refused(after_ready=True)
    return answer.reason, answer.detail


async def served(running: Running, name: str, target: str) -> None:
    visit = await asks(running, name, target)
    await visit.opened()
    visit.stream.reset()


# --- what a name has ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_each_name_of_a_service_has_its_target_and_no_other(name: str) -> None:
    allow = Rule.parse(action="allow", to=[ORDERS])
    async with gateway_of_two(allow) as (running, orders, db):
        await served(running, name, orders.target)
        for target in (db.endpoint, orders.endpoint, db.target, "10.77.0.6:22", "[::1]:22"):
            reason, detail = await refused(running, name, target)
            assert reason == "wrong_target", target
            assert target in detail
            assert name in detail
        assert not db.streams


async def test_an_address_name_has_its_address_and_port_and_no_other() -> None:
    async with gateway_of_two() as (running, orders, db):
        name = address_name(orders.endpoint)
        await served(running, name, orders.endpoint)
        for target in (db.endpoint, db.target, orders.target, "10.77.0.6:22"):
            assert (await refused(running, name, target))[0] == "wrong_target"
        assert not db.streams


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        (f"p8443-orders.shop.c.{D}", f"{ORDERS}:8443", "wrong_target"),
        (f"p1-127-0-0-1.c.{D}", "127.0.0.1:1", "wrong_target"),
        (f"p8444-orders.shop.b.{D}", f"{ORDERS}:8443", "wrong_target"),
        (f"p8443-orders.b.{D}", f"{ORDERS}:8443", "bad_name"),
        (f"p1-127-0-0-1.b.{D}", "127.0.0.1:2", "wrong_target"),
        (f"p1-127-0-0-1.b.other.{D.partition('.')[2]}", "127.0.0.1:1", "wrong_target"),
        (f"b.{D}", f"{ORDERS}:8443", "bad_name"),
        ("unknown.shop.example", "unknown.shop.example:8443", "unknown_name"),
        (f"p8443-unknown.shop.b.{D}", f"{ORDERS}:8443", "unknown_name"),
        ("shop.example", f"{ORDERS}:8443", "unknown_name"),
        (ORDERS, f"{ORDERS}:9443", "no_endpoint"),
        (f"p9443-orders.shop.b.{D}", f"{ORDERS}:9443", "no_endpoint"),
    ],
)
async def test_names_that_do_not_have_the_target(name: str, target: str, reason: str) -> None:
    async with gateway_of_two() as (running, orders, db):
        assert (await refused(running, name, target))[0] == reason
        (line,) = await running.ended()
        assert (line["reason"], line["sni"]) == (reason, name)
        assert not orders.streams
        assert not db.streams


async def test_a_name_that_leads_to_two_services_leads_to_neither() -> None:
    async with gateway_of_two() as (running, orders, _):
        running.discovery.put(known("orders.shop.other", orders.endpoint))
        short, whole = f"p8443-orders.shop.b.{D}", f"p8443-{ORDERS}.b.{D}"
        for target in (orders.target, "orders.shop.other:8443"):
            assert (await refused(running, short, target))[0] == "ambiguous_name"
        await served(running, whole, orders.target)


async def test_a_name_that_is_not_the_hellos() -> None:
    async with gateway_of_two() as (running, orders, _):
        assert (await refused(running, ORDERS, orders.target, sni=DB))[0] == "bad_signature"


@pytest.mark.parametrize("rules", [(), (Rule.parse(action="allow"),)])
async def test_without_a_view_of_discovery_nothing_is_delivered(rules: tuple[Rule, ...]) -> None:
    async with a_gateway(policy=Policy(rules)) as running:
        service = await running.service(known=False)
        running.discovery.synced = False
        for name, target in ((ORDERS, f"{ORDERS}:8443"), (address_name(service.endpoint), service.endpoint)):
            assert (await refused(running, name, target))[0] == "no_view"
        assert not service.streams
        running.discovery.put(record(Kind.NETWORK, "b", "b", NetworkSpec()), known(ORDERS, service.endpoint))
        if rules:
            assert (await refused(running, ORDERS, f"{ORDERS}:8443"))[0] == "no_view", (
                "a part of it does not do for rules"
            )
        running.discovery.synced = True
        await served(running, ORDERS, f"{ORDERS}:8443")


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*NAMES, "*.shop.example", "**.example", f"*.shop.b.{D}"])
@pytest.mark.parametrize("by", [*range(len(NAMES)), "compact address", "mangled address"])
async def test_deny_by_any_name_holds_for_every_name(pattern: str, by: int | str) -> None:
    async with gateway_of_two(Rule.parse(action="deny", to=[pattern]), Rule.parse(action="allow")) as (
        running,
        orders,
        _,
    ):
        name, target = named(orders, by)
        reason, detail = await refused(running, name, target)
        assert (reason, "rule 1 denies" in detail) == ("denied", True)
        assert not orders.streams
        other = await running.service("other.example", known=False)
        await served(running, address_name(other.endpoint), other.endpoint)


@pytest.mark.parametrize("pattern", [*NAMES, "*.shop.example", "**.example", f"*.shop.b.{D}"])
@pytest.mark.parametrize("by", [*range(len(NAMES)), "compact address", "mangled address"])
async def test_allow_by_any_name_holds_for_every_name_and_for_no_address(pattern: str, by: int | str) -> None:
    async with gateway_of_two(Rule.parse(action="allow", to=[pattern])) as (running, orders, db):
        name, target = named(orders, by)
        if isinstance(by, int):
            await served(running, name, target)
        else:
            assert (await refused(running, name, target))[0] == "denied"
        if "*" not in pattern:
            assert (await refused(running, DB, db.target))[0] == "denied"


def named(service: Service, by: int | str) -> tuple[str, str]:
    if isinstance(by, int):
        return NAMES[by], service.target
    compact = address_name(service.endpoint)
    port, _, address = compact.partition(".")[0].partition("-")
    return (compact if by == "compact address" else f"_{port[1:]}._{address}._b.{D}"), service.endpoint


async def test_names_selects_by_what_kind_of_name_was_asked() -> None:
    async with gateway_of_two(Rule.parse(action="allow", names=["service"])) as (running, orders, _):
        await served(running, NAMES[1], orders.target)
        assert (await refused(running, address_name(orders.endpoint), orders.endpoint))[0] == "denied"


async def test_allow_opens_nothing_that_the_allow_list_does_not() -> None:
    async with gateway_of_two(Rule.parse(action="allow", to=[ORDERS])) as (running, _, _):
        running.discovery.put(known(ORDERS, "192.0.2.1:8443"))
        reason, detail = await refused(running, ORDERS, f"{ORDERS}:8443")
        assert reason == "denied"
        assert "gateway.allow" in detail


async def test_services_that_share_an_endpoint() -> None:
    deny, allow = Rule.parse(action="deny", to=[DB]), Rule.parse(action="allow", to=["*.shop.example"])
    async with gateway_of_two(deny, allow) as (running, orders, db):
        running.discovery.put(known(DB, orders.endpoint))
        assert (await refused(running, ORDERS, orders.target))[0] == "denied"
        running.discovery.put(known(DB, db.endpoint))
        assert (await refused(running, ORDERS, orders.target))[0] == "denied", "it was the other's a moment ago"
        assert not orders.streams


async def test_an_endpoint_that_came_and_went_between_two_streams() -> None:
    async with gateway_of_two(Rule.parse(action="deny", to=[DB]), Rule.parse(action="allow")) as (running, orders, db):
        running.discovery.put(known(DB, orders.endpoint))
        running.discovery.remove(Kind.SERVICE, "b", DB)
        for endpoint in (orders.endpoint, db.endpoint):
            assert (await refused(running, address_name(endpoint), endpoint))[0] == "denied"
        assert not db.streams


@pytest.mark.parametrize(
    ("imports", "orders_served", "db_served"),
    [
        (None, True, True),
        (ORDERS, True, False),
        (f"other.example {DB}", False, True),
        ("*.shop.example", True, True),
        ("*.example shop.example **.example", False, False),
        ("", False, False),
        ("...", False, False),
    ],
)
async def test_an_address_name_does_not_bypass_the_imports_of_the_relays_network(
    imports: str | None, orders_served: bool, db_served: bool
) -> None:
    async with gateway_of_two() as (running, orders, db):
        nobodys = await running.service("other.example", known=False)
        for service, is_served in ((orders, orders_served), (db, db_served), (nobodys, True)):
            name = address_name(service.endpoint)
            hello = client_hello(name)
            asked = preamble(service.endpoint, hello, authority=name, imports=imports)
            visit = await running.visit(asked, hello)
            if is_served:
                await visit.opened()
                visit.stream.reset()
            else:
                answer = await visit.refused(after_ready=True)
                assert answer.reason == "denied"
                assert "which network 'a' does not import" in answer.detail
        await served(running, ORDERS, orders.target)


# --- what changes while a stream is being dialled -------------------------------------------------------------------


@pytest.mark.parametrize("change", ["record moves", "record goes", "another takes the endpoint", "rules"])
async def test_a_change_while_a_stream_is_dialled(change: str) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def held(endpoints: Iterator[Endpoint], **limits: Any) -> FirstConnected | None:
        connected = await connect_first(endpoints, **limits)
        reached.set()
        await go_on.wait()
        return connected

    rules = (Rule.parse(action="deny", to=[DB]), Rule.parse(action="allow", to=[ORDERS]))
    async with gateway_of_two(*rules, dial=held) as (running, orders, _):
        visit = await asks(running, ORDERS, orders.target)
        async with asyncio.timeout(10):
            await reached.wait()
        match change:
            case "record moves":
                running.discovery.put(known(ORDERS, "127.0.0.1:1"))
            case "record goes":
                running.discovery.remove(Kind.SERVICE, "b", ORDERS)
            case "another takes the endpoint":
                running.discovery.put(known(DB, orders.endpoint))
            case _:
                config = running.gateway.config
                running.gateway._service_dialer.reconfigure(
                    config.allow, Policy((Rule.parse(action="deny"),)), dial_timeout_s=5.0
                )
        go_on.set()
        assert (await visit.refused(after_ready=True)).reason in {"denied", "no_endpoint"}
        assert [bytes(got) for got in orders.got] in ([], [b""]), "the service has heard nothing of it"


async def test_a_held_stream_is_asked_about_again_when_its_service_wakes() -> None:
    """Its record gets an address of another service, which is denied."""
    woken = ActivationRule(names=(NamePattern.parse("*.shop.example"),), trigger=Command(("true",)))
    rules = (Rule.parse(action="deny", to=[DB]), Rule.parse(action="allow", to=[ORDERS]))
    async with gateway_of_two(*rules, activate=(woken,)) as (running, _, db):
        running.discovery.put(known(ORDERS))
        visit = await asks(running, ORDERS, f"{ORDERS}:8443")
        await visit.held()
        running.discovery.put(known(ORDERS, db.endpoint))
        assert (await visit.refused(after_ready=True)).reason == "denied"
        assert not db.streams


@pytest.mark.parametrize("written", ["[::1]", "[0:0:0:0:0:0:0:1]", "[0::0001]"])
async def test_an_ipv6_endpoint_however_its_record_writes_it(written: str) -> None:
    async def hold(stream: SocketStream) -> None:
        while await stream.recv():
            pass

    listener = await Listener.open("::1", 0)
    port = listener.address[1]
    allow = TargetList.parse(["[::1/128]"])
    names = [f"p{port}-x{1:032x}.b.{D}", f"_{port}._--1._b.{D}"]
    async with asyncio.TaskGroup() as group:
        task = group.create_task(listener.serve(hold))
        record_of = known(ORDERS, f"{written}:{port}")
        async with a_gateway(
            record_of, allow=allow, policy=Policy((Rule.parse(action="allow", to=[ORDERS]),))
        ) as running:
            await served(running, ORDERS, f"{ORDERS}:8443")
            for name in names:
                assert (await refused(running, name, f"[::1]:{port}"))[0] == "denied"
        deny = Policy((Rule.parse(action="deny", to=[ORDERS]), Rule.parse(action="allow")))
        async with a_gateway(record_of, allow=allow, policy=deny) as running:
            for name in names:
                assert (await refused(running, name, f"[::1]:{port}"))[0] == "denied"
        async with a_gateway(record_of, allow=allow) as running:
            for name in names:
                await served(running, name, f"[::1]:{port}")
        listener.close()
        task.cancel()
