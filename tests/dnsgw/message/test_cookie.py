"""Cookies, with the values that RFC 9018 appendix A gives."""

from ipaddress import ip_address

import dns.message
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnsgw.message.cookie import answer, is_well_formed, siphash24
from tests.support.dns_meshes import DOMAIN, mesh, relay
from tests.support.dns_packets import opt, option, query
from tests.support.dns_servers import Client, address, connected, running

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
SECRET = bytes.fromhex("e5e973e5a6b2a43f48e7dc849e37bfcf")
CASES = [
    ("2464c4abcf10c957", "198.51.100.100", 1559731985, SECRET, "010000005cf79f111f8130c3eee29480"),
    ("2464c4abcf10c957", "198.51.100.100", 1559734385, SECRET, "010000005cf7a871d4a564a1442aca77"),
    ("fc93fc62807ddb86", "203.0.113.203", 1559734700, SECRET, "010000005cf7a9acf73a7810aca2381e"),
    (
        "22681ab97d52c298",
        "2001:db8:220:1:59de:d0f4:8769:82b8",
        1559741961,
        bytes.fromhex("445536bcd2513298075a5d379663c962"),
        "010000005cf7c609a6bb79d16625507a",
    ),
]


@pytest.mark.parametrize(("client", "host", "now", "secret", "expected"), CASES)
def test_the_cookies_of_the_rfc(client: str, host: str, now: int, secret: bytes, expected: str) -> None:
    made = answer(bytes.fromhex(client), ip_address(host).packed, secret, now)
    assert made.hex() == client + expected


def test_siphash_of_its_paper() -> None:
    assert siphash24(bytes(range(16)), bytes(range(15))).hex() == "e545be4961ca29a1"


@given(st.binary(max_size=64))
def test_siphash_takes_anything(data: bytes) -> None:
    assert len(siphash24(SECRET, data)) == 8


@pytest.mark.parametrize(
    ("size", "good"), [(0, False), (7, False), (8, True), (9, False), (15, False), (16, True), (40, True), (41, False)]
)
def test_lengths(size: int, good: bool) -> None:
    assert is_well_formed(bytes(size)) == good


@pytest.mark.anyio
async def test_a_cookie_is_answered_with_one_that_stays_the_same_for_its_asker() -> None:
    async with running(mesh(relay("10.0.0.9")), cookie_secret=SECRET) as server, connected(server) as connection:
        with Client(address(server)) as client:
            replies = [
                await client.ask(query(ADDRESS, edns=opt(options=option(10, b"12345678")))),
                await client.ask(query(ADDRESS, edns=opt(options=option(10, b"12345678" + bytes(16))))),
                await connection.ask(query(ADDRESS, edns=opt(options=option(10, b"12345678")))),
                await client.ask(query(f"x.nope.{DOMAIN}", edns=opt(512, options=option(10, b"12345678")))),
            ]
            for reply in replies:
                cookies = [found.to_wire() for found in dns.message.from_wire(reply).options if found.otype == 10]
                assert [(found[:8], len(found), found[8:12]) for found in cookies] == [(b"12345678", 24, b"\1\0\0\0")]
            bad = dns.message.from_wire(await client.ask(query(ADDRESS, edns=opt(options=option(10, b"123")))))
            assert bad.rcode() == 1
            without = dns.message.from_wire(await client.ask(query(ADDRESS, edns=opt())))
            assert not without.options
