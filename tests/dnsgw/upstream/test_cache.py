"""The cache: which answers are kept, for how long, in how much memory, and the replies made of them."""

from dataclasses import replace

import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnsgw.message.names import Malformed
from dnsgw.message.question import Qtype, Query, scan
from dnsgw.message.upstream_reply import Message
from dnsgw.upstream.cache import Cache, CacheConfig, Entry, answer_cached, key_of
from tests.support.dns_packets import AD, CD, RD, header, opt, option, query

SOA = "test. 60 IN SOA ns.test. admin.test. 1 2 3 4 30"


def asked(text: str = "www.example.test", qtype: int = 1, **options: object) -> Query:
    return scan(query(text, qtype, **options))  # type: ignore[arg-type]


def answer(
    question: Query, *records: str, authority: tuple[str, ...] = (), rcode: int = 0, flags: str = "QR RD RA"
) -> Message:
    name = question.text()
    text = [f"id 1\nopcode QUERY\nrcode {dns.rcode.to_text(dns.rcode.Rcode(rcode))}\nflags {flags}\n;QUESTION"]
    text += [f"{name}. IN TYPE{question.qtype}", ";ANSWER", *records, ";AUTHORITY", *authority]
    return Message(dns.message.from_text("\n".join(text)).to_wire())


def kept(cache: Cache, question: Query, message: Message, now: float = 100.0) -> Entry | None:
    key = key_of(question)
    assert key is not None
    return cache.put(key, message, now)


def found(cache: Cache, question: Query) -> Entry | None:
    key = key_of(question)
    assert key is not None
    return cache.get(key)


def replied(entry: Entry, question: Query, now: float) -> dns.message.Message:
    wire = entry.reply(replace(question, id=7), now)
    return dns.message.from_wire(wire)


def test_ttls_are_counted_down_and_the_spelling_is_the_askers() -> None:
    cache = Cache(CacheConfig())
    entry = kept(cache, asked(), answer(asked(), "www.example.test. 300 IN A 192.0.2.1"))
    assert entry is not None
    assert entry.expires == 400
    other = asked("WWW.example.TEST", edns=opt())
    for now, ttl in ((100, 300), (100.9, 300), (101, 299), (350, 50), (399.9, 1)):
        reply = replied(entry, other, now)
        assert [rrset.ttl for rrset in reply.answer] == [ttl]
        assert reply.question[0].name.to_text() == "WWW.example.TEST."
        assert (reply.id, reply.edns, reply.flags) == (7, 0, dns.flags.QR | dns.flags.RD | dns.flags.RA)


def test_the_shortest_ttl_of_a_chain_is_the_life_of_all_of_it() -> None:
    chain = answer(asked(), "www.example.test. 300 IN CNAME a.test.", "a.test. 20 IN A 192.0.2.1")
    entry = kept(Cache(CacheConfig()), asked(), chain)
    assert entry is not None
    assert entry.expires == 120
    assert entry.targets == (b"\1a\4test\0",)
    assert [rrset.ttl for rrset in replied(entry, asked(), 110).answer] == [290, 10]


def test_lives_are_capped() -> None:
    cache = Cache(CacheConfig(max_ttl_s=60, max_negative_ttl_s=10))
    entry = kept(cache, asked(), answer(asked(), "www.example.test. 86400 IN A 192.0.2.1"))
    assert entry is not None
    assert entry.expires == 160
    assert replied(entry, asked(), 100).answer[0].ttl == 60
    absent = kept(cache, asked("nope.test"), answer(asked("nope.test"), authority=(SOA,), rcode=3))
    assert absent is not None
    assert absent.expires == 110


@pytest.mark.parametrize(("soa", "life"), [(SOA, 30), (SOA.replace(" 60 ", " 20 "), 20)])
def test_negative_answers_are_cached_as_the_soa_says(soa: str, life: int) -> None:
    """RFC 2308 section 5; and a name that has neither address is not there, and has no other types either."""
    cache = Cache(CacheConfig())
    entry = kept(cache, asked("nope.test"), answer(asked("nope.test"), authority=(soa,), rcode=3))
    assert entry is not None
    assert entry.expires == 100 + life
    assert found(cache, asked("nope.test")) is entry
    assert found(cache, asked("nope.test", Qtype.AAAA)) is None
    other = asked("nope.test", Qtype.AAAA)
    entry = kept(cache, other, answer(other, authority=(soa,), rcode=3))
    assert entry is not None
    assert all(found(cache, asked("nope.test", qtype)) is entry for qtype in (Qtype.A, Qtype.AAAA, 16))
    assert len(cache) == 1
    nodata = kept(cache, asked("www.test"), answer(asked("www.test"), authority=(soa,)))
    assert nodata is not None
    assert nodata.expires == 100 + life
    assert found(cache, asked("www.test", Qtype.AAAA)) is None


def test_a_name_that_lacks_one_type_is_not_denied() -> None:
    """Many servers answer NXDOMAIN for a type that a name lacks."""
    cache = Cache(CacheConfig())
    half, other = asked("www.test", Qtype.AAAA), asked("www.test")
    denied = kept(cache, half, answer(half, authority=(SOA,), rcode=3))
    assert found(cache, other) is None
    there = kept(cache, other, answer(other, "www.test. 300 IN A 192.0.2.1"))
    assert found(cache, other) is there
    assert found(cache, half) is denied
    kept(cache, half, answer(half, authority=(SOA,), rcode=3))
    assert found(cache, other) is there
    assert found(cache, asked("www.test", 16)) is None


def test_an_expired_denial_confirms_none() -> None:
    cache = Cache(CacheConfig())
    for qtype, now in ((Qtype.A, 100.0), (Qtype.AAAA, 130.0)):
        kept(cache, asked("nope.test", qtype), answer(asked("nope.test", qtype), authority=(SOA,), rcode=3), now)
    assert found(cache, asked("nope.test", 16)) is None


def test_a_name_that_appears_is_denied_no_longer() -> None:
    cache = Cache(CacheConfig())
    for qtype in (Qtype.A, Qtype.AAAA):
        kept(cache, asked("new.test", qtype), answer(asked("new.test", qtype), authority=(SOA,), rcode=3))
    assert found(cache, asked("new.test", 16)) is not None
    kept(cache, asked("new.test"), answer(asked("new.test"), "new.test. 300 IN A 192.0.2.1"))
    assert found(cache, asked("new.test", 16)) is None
    assert found(cache, asked("new.test", Qtype.AAAA)) is None


@pytest.mark.parametrize(
    "message",
    [
        answer(asked()),
        answer(asked(), authority=("example.test. 60 IN NS ns.test.",)),
        answer(asked(), rcode=3),
        answer(asked(), rcode=2, authority=(SOA,)),
        answer(asked(), "www.example.test. 0 IN A 192.0.2.1"),
        answer(asked(), "www.example.test. 60 IN A 192.0.2.1", flags="QR TC"),
        answer(asked(), "www.example.test. 300 IN CNAME a.test."),
    ],
    ids=["empty", "referral", "no SOA", "failure", "TTL 0", "truncated", "alias to nothing"],
)
def test_negative_answers_without_a_soa_are_not_cached(message: Message) -> None:
    assert kept(Cache(CacheConfig()), asked(), message) is None


def test_a_ttl_with_its_sign_set_is_none() -> None:
    """RFC 2181 section 8."""
    wire = bytearray(answer(asked(), "www.example.test. 60 IN A 192.0.2.1").data)
    at = wire.rindex((60).to_bytes(4, "big"))
    wire[at] = 0x80
    assert kept(Cache(CacheConfig()), asked(), Message(bytes(wire))) is None


def test_a_soa_cut_short_is_malformed() -> None:
    wire = answer(asked(), authority=(SOA,)).data
    at = len(wire) - 20 - 5
    cut = wire[: wire.index(b"\0\6\0\1", 30) + 8] + b"\0\2" + wire[at : at + 2]
    with pytest.raises(Malformed):
        kept(Cache(CacheConfig()), asked(), Message(cut))


@pytest.mark.parametrize(
    "other",
    [
        query("www.example.test", flags=0),
        query("www.example.test", 255),
        header(counts=(1, 0, 0, 1)) + query("www.example.test")[12:] + b"\0" + bytes.fromhex("00fa00ff000000000000"),
    ],
    ids=["no RD", "ANY", "signed"],
)
def test_questions_that_may_be_answered_otherwise_are_not_looked_up(other: bytes) -> None:
    assert key_of(scan(other)) is None


def test_only_what_changes_the_answer_is_part_of_the_key() -> None:
    shapes = [{"flags": RD | bits, "edns": edns} for bits in (0, AD, CD, AD | CD) for edns in (b"", opt(do=True))]
    keys = [key_of(asked(**shape)) for shape in shapes]  # type: ignore[arg-type]
    assert len(set(keys)) == 4
    for options in (option(10, b"12345678"), option(8, b"\0\1\x18\0\x0a\0\0"), option(65001)):
        assert key_of(asked(edns=opt(512, options=options, z=7))) == key_of(asked(flags=RD | 0x40)) == key_of(asked())


def test_ad_is_only_for_clients_that_want_it() -> None:
    message = answer(asked(), "www.example.test. 60 IN A 192.0.2.1", flags="QR RD RA AD AA")
    for flags, edns, expected in ((RD, b"", False), (RD | AD, b"", True), (RD, opt(do=True), True)):
        question = asked(flags=flags, edns=edns)
        cache = Cache(CacheConfig())
        entry = kept(cache, asked(edns=edns), message)
        assert entry is not None
        reply = replied(entry, question, 100)
        heated(cache, asked(edns=edns), message)
        at_once = answer_cached(query("www.example.test", flags=flags, edns=edns), cache.hot, 100)
        assert at_once is not None
        assert dns.message.from_wire(at_once).flags == reply.flags
        assert (bool(reply.flags & dns.flags.AD), bool(reply.flags & dns.flags.AA)) == (expected, False)


def test_an_answer_past_its_end_has_a_short_ttl_and_says_so() -> None:
    """RFC 8767 section 4."""
    cache = Cache(CacheConfig(stale_for_s=1000))
    entry = kept(cache, asked(), answer(asked(), "www.example.test. 60 IN A 192.0.2.1"))
    assert entry is not None
    assert cache.may_be_stale(entry, 1159)
    assert not cache.may_be_stale(entry, 1160)
    wire = entry.stale_reply(replace(asked(edns=opt()), id=1), option(15, b"\0\3"))
    reply = dns.message.from_wire(wire)
    assert reply.answer[0].ttl == 30
    assert reply.options[0].otype == 15


# answer_cached.


def heated(cache: Cache, question: Query, message: Message) -> None:
    entry = kept(cache, question, message)
    key = key_of(question)
    assert entry is not None
    assert key is not None
    cache.heat(key, entry)


def test_a_plain_question_is_answered_at_once() -> None:
    cache = Cache(CacheConfig())
    message = answer(asked(), "www.example.test. 60 IN A 192.0.2.1")
    heated(cache, asked(), message)
    for packet in (query("WWW.example.test"), query("www.example.test", edns=opt())):
        reply = answer_cached(packet, cache.hot, 101)
        assert reply is not None
        assert reply[:2] == packet[:2]
        assert dns.message.from_wire(reply).answer[0].ttl == 59
    for packet in (
        query("www.example.test", edns=opt(do=True)),
        query("www.example.test", flags=RD | CD),
        query("www.example.test", flags=0),
        query("www.example.test", edns=opt(version=1)),
        query("www.example.test", edns=opt(options=option(10, b"12345678"))),
        query("www.example.test") + b"\0",
        query("www.example.test", Qtype.AAAA),
        query("www.example.test", qclass=3),
        b"",
        header(),
    ):
        assert answer_cached(packet, cache.hot, 101) is None
    # It expires soon, so upstream should be asked again.
    assert answer_cached(query("www.example.test"), cache.hot, 155) is None


def test_answers_above_the_clients_limit_are_left_to_the_full_path() -> None:
    cache = Cache(CacheConfig())
    records = [f"www.example.test. 60 IN A 192.0.2.{n}" for n in range(60)]
    heated(cache, asked(), answer(asked(), *records))
    assert answer_cached(query("www.example.test"), cache.hot, 101) is None
    assert answer_cached(query("www.example.test", edns=opt(512)), cache.hot, 101) is None
    assert answer_cached(query("www.example.test", edns=opt(4096)), cache.hot, 101) is not None


@given(st.binary(max_size=80))
def test_no_packet_makes_it_raise(packet: bytes) -> None:
    cache = Cache(CacheConfig())
    heated(cache, asked(), answer(asked(), "www.example.test. 60 IN A 192.0.2.1"))
    answer_cached(packet, cache.hot, 101)
    answer_cached(query("www.example.test")[: len(packet)] + packet, cache.hot, 101)


# Memory.


def fill(cache: Cache, name: str, now: float = 100.0) -> None:
    kept(cache, asked(name), answer(asked(name), f"{name}. 60 IN A 192.0.2.1"), now)


def test_it_never_takes_more_than_its_bytes() -> None:
    cache = Cache(CacheConfig(max_bytes=100_000))
    for n in range(1000):
        fill(cache, f"n{n}.test")
        assert cache.size <= 100_000
    assert 50 < len(cache) < 200
    assert cache.evicted == 1000 - len(cache)
    assert cache.size == sum(entry.size for queue in (cache._small, cache._main) for entry in queue.values())


def test_a_flood_of_names_pushes_out_nothing_that_is_in_use() -> None:
    cache = Cache(CacheConfig(max_bytes=200_000))
    real = [f"real{n}.test" for n in range(50)]
    for name in real:
        fill(cache, name)
        key = key_of(asked(name))
        entry = found(cache, asked(name))
        assert key is not None
        assert entry is not None
        cache.heat(key, entry)
        assert answer_cached(query(name), cache.hot, 101) is not None
    for n in range(5000):
        fill(cache, f"x{n}.flood.test")
        assert len(cache.hot) <= 50
    assert all(found(cache, asked(name)) is not None for name in real)


def test_an_evicted_entry_that_comes_back_stays() -> None:
    cache = Cache(CacheConfig(max_bytes=100_000))
    for n in range(300):
        fill(cache, f"n{n}.test")
    gone = next(n for n in range(299, 0, -1) if found(cache, asked(f"n{n}.test")) is None)
    fill(cache, f"n{gone}.test")
    for n in range(300, 600):
        fill(cache, f"n{n}.test")
    assert found(cache, asked(f"n{gone}.test")) is not None


def test_nothing_is_kept_in_no_room() -> None:
    assert (
        kept(Cache(CacheConfig(max_bytes=0)), asked(), answer(asked(), "www.example.test. 60 IN A 192.0.2.1")) is None
    )


def test_aliases_to_a_name_are_flushed_with_it() -> None:
    cache = Cache(CacheConfig(max_bytes=100_000))
    chain = ("a.test. 60 IN CNAME b.test.", "b.test. 60 IN CNAME c.test.")
    ring = (*chain, "c.test. 60 IN CNAME b.test.")  # b twice
    for name in (b"\1b\4test\0", b"\1c\4test\0"):
        for records in (chain, ring):
            kept(cache, asked("a.test"), answer(asked("a.test"), *records, authority=(SOA,), rcode=3))
            kept(cache, asked("a.test"), answer(asked("a.test"), *records, authority=(SOA,), rcode=3))
            fill(cache, "d.test")
            cache.flush([b"\1d\4test\0\0", name])
            assert found(cache, asked("a.test")) is None
            assert found(cache, asked("d.test")) is not None
    for n in range(500):
        kept(
            cache, asked(f"n{n}.test"), answer(asked(f"n{n}.test"), f"n{n}.test. 60 IN CNAME c.test.", authority=(SOA,))
        )
    assert sum(map(len, cache._leading.values())) == len(cache) > 10
    cache.clear()
    assert (len(cache), cache.size, cache._leading, cache._small_size) == (0, 0, {}, 0)


def test_lower_caps_and_less_room_count_at_once() -> None:
    cache = Cache(CacheConfig())
    for n in range(50):
        fill(cache, f"n{n}.test")
    kept(cache, asked("gone.test"), answer(asked("gone.test"), authority=(SOA,), rcode=3))
    cache.reconfigure(CacheConfig(max_ttl_s=60, max_negative_ttl_s=30))
    assert len(cache) == 1  # a minute is longer than one of the caps
    fill(cache, "n.test")
    cache.reconfigure(CacheConfig(max_ttl_s=60, max_negative_ttl_s=30, max_bytes=0))
    assert (len(cache), cache.size) == (0, 0)


def test_names_are_forgotten_on_request() -> None:
    cache = Cache(CacheConfig())
    fill(cache, "a.test")
    fill(cache, "b.test")
    kept(cache, asked("c.test"), answer(asked("c.test"), authority=(SOA,), rcode=3))
    entry = found(cache, asked("a.test"))
    key = key_of(asked("a.test"))
    assert entry is not None
    assert key is not None
    cache.heat(key, entry)
    cache.flush([b"\1a\4test\0", b"\1c\4test\0"])
    assert not cache.hot
    assert [found(cache, asked(f"{name}.test")) is None for name in "abc"] == [True, False, True]
    for qtype in range(1000, 1100):
        kept(cache, asked("d.test", qtype), answer(asked("d.test", qtype), f"d.test. 60 IN TYPE{qtype} \\# 1 00"))
    cache.flush([b"\1d\4test\0"])
    assert len(cache) == 1
    assert cache.size == sum(entry.size for queue in (cache._small, cache._main) for entry in queue.values())
