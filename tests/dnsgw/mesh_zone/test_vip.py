"""One stable address for each imported service."""

from ipaddress import ip_address, ip_network

import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.model.mesh import Kind, Mesh, Record, VipSpec
from discovery.model.spec import BadRecord, check_spec, is_record_id
from dnsgw.mesh_zone.local_zones import reverse_zones
from dnsgw.mesh_zone.vip import MAX_DRAWS, address_of, claim, draws, imported_names, record_id
from dnsgw.message.question import Qtype
from tests.support.dns_meshes import ORDERS, imports, mesh, relay
from tests.support.dns_packets import query
from tests.support.dns_servers import Client, address, running

RANGE = ip_network("240.0.0.0/16")
NAME = "orders.shop.svc.cluster.local"


def vip(found: tuple[str, VipSpec]) -> Record[VipSpec]:
    return Record(kind=Kind.VIP, network="a", id=found[0], revision=9, spec=found[1])


def claimed(mesh: Mesh, name: str, vips: object = RANGE) -> Mesh:
    found = claim(name, mesh, "a", vips)  # type: ignore[arg-type]
    assert found is not None
    return mesh.apply([vip(found)])


@pytest.mark.parametrize("vips", ["240.0.0.0/16", "240.0.0.0/28", "fd00:1::/64", "fd00:1::/112"])
@given(st.text("abc.", min_size=1, max_size=9))
def test_draws_are_in_the_range_and_always_the_same(vips: str, name: str) -> None:
    network = ip_network(vips)
    found = list(draws(name, network))
    assert len(found) == MAX_DRAWS
    assert found == list(draws(name, network))
    assert all(one in network and one not in (network[0], network[-1]) for one in found)
    assert all(is_record_id(record_id(one)) for one in found)


def test_ids_and_addresses_are_one_to_one() -> None:
    texts = ["240.0.0.1", "::1", "::0.1.0.1", "fd00::1:1", "fd00:1::1"]
    assert len({record_id(ip_address(text)) for text in texts}) == len(texts)


def test_a_name_has_the_first_of_its_draws_that_is_free() -> None:
    view = mesh()
    assert address_of(NAME, view, "a", RANGE) is None
    taken = VipSpec(name="other.shop", address=str(next(draws(NAME, RANGE))))
    view = view.apply([vip((record_id(ip_address(taken.address)), taken))])
    view = claimed(view, NAME)
    first, second, *_ = draws(NAME, RANGE)
    assert address_of(NAME, view, "a", RANGE) == second != first
    assert claim(NAME, view, "a", RANGE) is None


def test_concurrent_claims_agree_in_the_end() -> None:
    """Both want one address for two names: the server takes the first, and the other draws again."""
    narrow = ip_network("240.0.0.0/28")
    names = [f"n{n}.shop" for n in range(10)]
    view = mesh()
    for _ in range(MAX_DRAWS):
        wanted = [claim(name, view, "a", narrow) for name in names]  # all at once, from one view
        for found in wanted:
            if found is not None and view.record(Kind.VIP, "a", found[0]) is None:
                view = view.apply([vip(found)])
    addresses = [address_of(name, view, "a", narrow) for name in names]
    assert len({found for found in addresses if found}) == len([found for found in addresses if found]) >= 9


def test_a_range_that_is_full_has_nothing_for_more() -> None:
    narrow = ip_network("240.0.0.0/29")
    view = mesh()
    for n in range(50):
        found = claim(f"n{n}.shop", view, "a", narrow)
        if found is not None:
            view = view.apply([vip(found)])
    assert len(view.vips("a")) <= 6
    assert claim("one.more", view, "a", narrow) is None


def test_what_is_imported() -> None:
    assert sorted(set(imported_names(mesh(), imports()))) == [
        "bills.shop.svc.cluster.local",
        NAME,
        "stock.depot.example",
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("vips", ["240.0.0.0/16", "fd00:1::/64"])
async def test_answers_and_the_way_back(vips: str) -> None:
    claims: dict[str, VipSpec] = {}
    view = mesh(relay("10.0.0.9", "fd00::9"))
    network = ip_network(vips)
    half, other = (Qtype.A, Qtype.AAAA) if network.version == 4 else (Qtype.AAAA, Qtype.A)
    async with running(view, vip=network, imports=imports(), claim=claims.__setitem__) as server:
        with Client(address(server)) as early, Client(address(server), "127.0.0.2") as late:

            async def ask(name: str, qtype: int, client: Client = late) -> list[str]:
                reply = dns.message.from_wire(await client.ask(query(name, qtype)))
                assert reply.rcode() == 0
                return [str(item) for rrset in reply.answer for item in rrset]

            # Before its record is there the relays will do; what has a server name loses nothing.
            assert await ask(ORDERS, Qtype.A, early) == ["10.0.0.9"]
            assert {spec.name for spec in claims.values()} == set(imported_names(view, imports()))
            server.apply(view.apply([vip(item) for item in claims.items()]))
            (stable,) = await ask(ORDERS, half)
            assert ip_address(stable) in network
            assert await ask(ORDERS, other) == []
            back = ip_address(stable).reverse_pointer
            assert await ask(back, Qtype.PTR) == [ORDERS + "."]
            assert await ask(back, Qtype.A) == []
            assert await ask(back.partition(".")[2], Qtype.PTR) == []  # names lie below
            # The rest of the range is ours too, and nobody else is asked for it.
            nobody = dns.message.from_wire(await late.ask(query(network[1].reverse_pointer, Qtype.PTR)))
            assert nobody.rcode() == dns.rcode.NXDOMAIN
            assert nobody.authority[0].name.to_text(omit_final_dot=True) == next(reverse_zones(network))
            # Names that say where they lead need none.
            assert await ask("p8443-10-1-0-5.b.svc.mesh.internal", Qtype.A) == ["10.0.0.9"]


@pytest.mark.parametrize(
    ("text", "good"), [("240.0.0.7", True), ("fd00:1::7", True), ("127.0.0.1", False), ("224.0.0.1", False)]
)
def test_a_record_may_name_an_address_where_no_host_is(text: str, good: bool) -> None:
    if good:
        check_spec(Kind.VIP, "a", VipSpec(name=NAME, address=text))
    else:
        with pytest.raises(BadRecord):
            check_spec(Kind.VIP, "a", VipSpec(name=NAME, address=text))
