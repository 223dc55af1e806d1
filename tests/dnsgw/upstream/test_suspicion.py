"""Answers that may be forged: over UDP they are not accepted, and the question is asked in another way."""

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dnsgw.metrics import UpstreamOutcome
from dnsgw.upstream.exchange import Failure
from tests.dnsgw.upstream.test_forwarder import RECORDS, Asker, asking
from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_packets import opt, option

pytestmark = pytest.mark.anyio

NAME = "a-rather-long-name-with-many-letters.example.test"
SERVER_HALF = b"01234567"


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving({**RECORDS, (NAME, "A"): ["192.0.2.5"]}) as authority:
        yield authority


def lower(asked: Asked) -> bytes:
    stop = 12 + len(asked.question) - 4
    return asked.answer[:12] + asked.answer[12:stop].lower() + asked.answer[stop:]


def wrong_ids(asked: Asked, count: int) -> list[bytes]:
    return [bytes((asked.answer[0] ^ n, asked.answer[1])) + asked.answer[2:] for n in range(1, count + 1)]


def transports(upstream: Authority) -> str:
    return "".join("t" if asked.tcp else "u" for asked in upstream.asked)


def case_of(asker: Asker) -> Any:
    (upstream,) = asker.forwarder.upstreams
    return upstream.status()["random_case"]


# Wrong ids.


@pytest.mark.parametrize(("count", "asked"), [(3, "u"), (4, "ut")])
async def test_more_than_a_few_wrong_ids_lead_to_tcp(upstream: Authority, count: int, asked: str) -> None:
    upstream.script = lambda asked: [asked.answer] if asked.tcp else [*wrong_ids(asked, count), asked.answer]
    async with asking(upstream.port, random_case=True) as asker:
        assert isinstance(await asker.ask(NAME).answer(), bytes)
        assert transports(upstream) == asked
        # Once the question is asked over TCP, the true answer over UDP is ignored, too.
        assert asker.count(UpstreamOutcome.WRONG_ID) == count + len(asked) - 1
        assert asker.count(UpstreamOutcome.DISTRUSTED) == len(asked) - 1


async def test_wrong_ids_at_another_port_of_ours_count_too(upstream: Authority) -> None:
    seen: list[Asked] = []

    def forge(asked: Asked) -> list[bytes]:
        if asked.tcp:
            return [asked.answer]
        seen.append(asked)
        if asked.name != NAME:
            return []
        for other in seen:
            if other.source != asked.source:
                for packet in wrong_ids(asked, 4):
                    upstream.send(packet, other.source)
        return []

    upstream.script = forge
    async with asking(upstream.port, attempt_s=20, total_s=40) as asker:
        for n in range(8):
            asker.ask(f"n{n}.example.test")
        assert isinstance(await asker.ask(NAME).answer(), bytes)
        assert upstream.asked[-1].tcp


@pytest.mark.parametrize("silent", [False, True], ids=["closed", "silent"])
async def test_without_tcp_it_continues_over_udp_with_a_new_id_and_port(upstream: Authority, silent: bool) -> None:
    def forge(asked: Asked) -> list[bytes]:
        if asked.tcp:
            return []
        return wrong_ids(asked, 4) if len(transports(upstream).replace("t", "")) == 1 else [asked.answer]

    upstream.script = forge
    if not silent:
        upstream.close_after = 0
    async with asking(upstream.port, attempt_s=0.1, total_s=5) as asker:
        assert isinstance(await asker.ask(NAME).answer(), bytes)
        assert transports(upstream) == ("utu" if silent else "uu")
        first, last = upstream.asked[0], upstream.asked[-1]
        assert first.packet[:2] != last.packet[:2]
        assert first.source != last.source
        # For a while TCP is not tried again.
        upstream.asked.clear()
        upstream.close_after = None
        assert isinstance(await asker.ask("www.example.test").answer(), bytes)
        assert transports(upstream) == "uu"


async def test_a_socket_that_is_flooded_is_closed(upstream: Authority) -> None:
    def flood(asked: Asked) -> list[bytes]:
        if asked.tcp or len(upstream.asked) > 1:
            return [asked.answer]
        return [os.urandom(40) for _ in range(150)]

    upstream.script = flood
    async with asking(upstream.port, attempt_s=20, total_s=40) as asker:
        assert isinstance(await asker.ask(NAME).answer(), bytes)
        assert transports(upstream) == "ut"
        assert asker.count(UpstreamOutcome.FLOODED) == 1
        assert asker.count(UpstreamOutcome.UNREACHABLE) == 0


async def test_a_connection_with_answers_to_nothing_is_ended(
    upstream: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    def flood(asked: Asked) -> list[bytes]:
        return wrong_ids(asked, 120) * 5 if upstream.connections == 1 else [asked.answer]

    upstream.script = flood
    async with asking(upstream.port, attempt_s=20, total_s=40) as asker:
        assert isinstance(await asker.ask(NAME, tcp=True).answer(), bytes)
        assert upstream.connections == 2
        assert asker.count(UpstreamOutcome.FLOODED) == 1
    assert "dns_upstream_refused" in caplog.text


# Random case (DNS 0x20).


async def test_the_case_is_random_and_the_client_does_not_see_it(upstream: Authority) -> None:
    async with asking(upstream.port, random_case=True) as asker:
        seen = set()
        for qtype in range(1, 6):
            answer = await asker.ask(NAME, qtype).answer()
            assert NAME.split(".")[0].encode() in answer
            seen.add(upstream.asked[-1].question[:-4])
        assert len(seen) == 5
        assert transports(upstream) == "uuuuu"


async def test_the_wrong_case_is_asked_for_over_tcp(upstream: Authority) -> None:
    upstream.script = lambda asked: [asked.answer if asked.tcp else lower(asked)]
    async with asking(upstream.port, random_case=True) as asker:
        for count in range(1, 3):
            await asker.ask(NAME, count).answer()
            assert transports(upstream) == "ut" * count
            assert asker.count(UpstreamOutcome.MISSPELLED) == count
        assert case_of(asker) == "on"


async def test_an_upstream_that_loses_the_case_over_tcp_is_asked_in_lower_case(
    upstream: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.script = lambda asked: [lower(asked)]
    async with asking(upstream.port, random_case=True) as asker:
        await asker.ask(NAME).answer()
        assert transports(upstream) == "utt"
        assert "lost" in case_of(asker)
        assert caplog.text.count("dns_case_lost") == 1
        upstream.asked.clear()
        for qtype in range(1, 4):
            await asker.ask(NAME, qtype).answer()
        assert transports(upstream) == "uuu"
        assert {asked.question[:-4] for asked in upstream.asked} == {upstream.asked[0].question[:-4].lower()}
        # After an hour it is tried again.
        (one,) = asker.forwarder.upstreams
        one.abilities._case_off = asyncio.get_running_loop().time()
        upstream.asked.clear()
        upstream.script = None
        await asker.ask(NAME, 9).answer()
        assert transports(upstream) == "u"
        assert case_of(asker) == "on"


async def test_the_wrong_case_is_never_believed(upstream: Authority) -> None:
    upstream.script = lambda asked: [lower(asked)]
    upstream.close_after = 0
    async with asking(upstream.port, random_case=True, attempt_s=0.1, total_s=0.4) as asker:
        assert await asker.ask(NAME).result() is Failure.TIMEOUT
        assert case_of(asker) == "on"


# Errors that prove nothing, and servers from before EDNS.


async def test_an_error_without_the_question_is_asked_again_over_tcp(upstream: Authority) -> None:
    upstream.script = lambda asked: [
        asked.answer if asked.tcp else asked.packet[:2] + b"\x81\x82" + bytes(8),
    ]
    async with asking(upstream.port, random_case=True) as asker:
        assert (await asker.ask(NAME).answer())[3] & 15 == 0
        assert transports(upstream) == "ut"


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("tcp", [False, True], ids=["UDP alone", "TCP too"])
async def test_an_upstream_without_edns_is_asked_without(upstream: Authority, bare: bool, tcp: bool) -> None:
    def ancient(asked: Asked) -> list[bytes]:
        if asked.message.edns < 0:
            return [asked.answer]
        head = asked.packet[:2] + b"\x81\x81"
        return [head + bytes(8) if bare else head + b"\0\1" + bytes(6) + asked.question]

    upstream.script = ancient
    if not tcp:
        upstream.close_after = 0
    async with asking(upstream.port, random_case=True, attempt_s=0.2, total_s=5) as asker:
        assert (await asker.ask(NAME).answer())[3] & 15 == 0
        assert upstream.asked[-1].message.edns < 0


async def test_a_lost_packet_does_not_cost_dnssec(upstream: Authority) -> None:
    upstream.script = lambda asked: [asked.answer] if len(upstream.asked) > 1 else []
    async with asking(upstream.port, attempt_s=0.05, total_s=5) as asker:
        await asker.ask(NAME, edns=opt(do=True)).answer()
        assert [asked.message.ednsflags for asked in upstream.asked] == [0x8000] * 2


async def test_an_upstream_that_ignores_edns_is_asked_without(upstream: Authority) -> None:
    upstream.script = lambda asked: [asked.answer] if asked.message.edns < 0 else []
    async with asking(upstream.port, attempt_s=0.05, total_s=5) as asker:
        assert isinstance(await asker.ask(NAME).answer(), bytes)


# Cookies (RFC 7873).


class Cookies:
    """What a server with cookies says: `says` makes the cookie of an answer from the one that came; empty: none."""

    def __init__(self, upstream: Authority, says: Callable[[bytes], bytes]) -> None:
        self.says = says
        self.over_tcp = says
        self.seen: list[bytes] = []
        upstream.script = self

    def __call__(self, asked: Asked) -> list[bytes]:
        found = [each.to_wire() for each in asked.message.options if int(each.otype) == 10]
        self.seen += [bytes(each) for each in found if each]
        if not found:
            return [asked.answer]
        said = (self.over_tcp if asked.tcp else self.says)(bytes(found[0] or b""))
        options = option(10, said) if said else b""
        assert asked.answer.endswith(opt())
        return [asked.answer[: -len(opt())] + opt(options=options)]


def good(came: bytes) -> bytes:
    return came[:8] + SERVER_HALF


async def test_cookies_are_learned_and_sent_back(upstream: Authority) -> None:
    cookies = Cookies(upstream, good)
    async with asking(upstream.port) as asker:
        for n in range(3):
            await asker.ask(f"n{n}.example.test").answer()
        assert [len(each) for each in cookies.seen] == [8, 16, 16]
        assert {each[:8] for each in cookies.seen} == {cookies.seen[0]}
        assert cookies.seen[1][8:] == SERVER_HALF
        assert asker.forwarder.upstreams[0].status()["cookies"] is True
    async with asking(upstream.port) as other:
        await other.ask("n9.example.test").answer()
        assert cookies.seen[-1] != cookies.seen[0]  # another secret


@pytest.mark.parametrize(
    "says",
    [lambda came: b"", lambda came: came[:8], lambda came: b"x" * 8 + SERVER_HALF],
    ids=["none", "half", "another's"],
)
async def test_an_answer_without_the_cookie_is_not_believed(
    upstream: Authority, says: Callable[[bytes], bytes]
) -> None:
    cookies = Cookies(upstream, good)
    async with asking(upstream.port) as asker:
        await asker.ask("n1.example.test").answer()
        upstream.asked.clear()
        cookies.says = says
        await asker.ask("n2.example.test").answer()
        assert transports(upstream) == "ut"
        assert asker.count(UpstreamOutcome.WRONG_COOKIE) == 1
        upstream.asked.clear()
        # Over TCP it shows that it has lost its cookies: then they are not required any more.
        cookies.over_tcp = says
        upstream.asked.clear()
        await asker.ask("n3.example.test").answer()
        await asker.ask("n4.example.test").answer()
        assert transports(upstream)[:2] == "ut"
        # Without TCP there is an answer, too.
        cookies.says = cookies.over_tcp = good
        await asker.ask("n5.example.test").answer()
        cookies.says = says
        upstream.close_after = 0
    async with asking(upstream.port, attempt_s=0.2, total_s=5) as asker:
        cookies.says = good
        await asker.ask("n6.example.test").answer()
        cookies.says = says
        upstream.asked.clear()
        await asker.ask("n7.example.test").answer()
        assert transports(upstream) == "uuu"


@pytest.mark.parametrize(("refusals", "asked"), [(1, "uu"), (2, "uut"), (3, "uutt")])
async def test_a_bad_cookie_is_renewed_once_and_then_tcp_is_asked(
    upstream: Authority, refusals: int, asked: str
) -> None:
    def script(asked: Asked) -> list[bytes]:
        (came,) = [bytes(each.to_wire() or b"") for each in asked.message.options] or [b""]
        options = option(10, came[:8] + SERVER_HALF)
        if len(upstream.asked) > refusals:
            return [asked.answer[: -len(opt())] + opt(options=options)] if came else [asked.answer]
        reply = asked.answer[:3] + b"\x87" + b"\0\1\0\0\0\0\0\1" + asked.question
        return [reply + b"\0" + struct.pack("!HHBBHH", 41, 1232, 1, 0, 0, len(options)) + options]

    upstream.script = script
    async with asking(upstream.port) as asker:
        assert (await asker.ask(NAME).answer())[3] & 15 == 0
        assert transports(upstream) == asked
        assert SERVER_HALF in upstream.asked[1].packet


# How much is out, and from where.


async def test_a_handful_is_out_about_one_name_and_type(upstream: Authority) -> None:
    held: list[Asked] = []
    upstream.script = lambda asked: held.append(asked) or []  # type: ignore[func-returns-value]
    async with asking(upstream.port, client_subnet=True, attempt_s=20, total_s=40) as asker:
        waiting = [asker.ask(NAME, edns=opt(options=option(8, bytes((0, 1, 24, 0, 10, n, 0))))) for n in range(50)]
        waiting.append(asker.ask("other.example.test"))
        await upstream.heard(5)  # all were sent in this order, so the other name would come behind a fifth
        assert [asked.name for asked in held] == [NAME] * 4 + ["other.example.test"]
        upstream.script = None
        for asked in held:
            upstream.send(asked.answer, asked.source)
        for one in waiting:
            await one.answer()
        assert len(upstream.asked) == 51


async def test_waiting_questions_fail_when_upstream_becomes_unreachable(
    upstream: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = lambda asked: []
    async with asking(upstream.port, client_subnet=True, attempt_s=20, total_s=40) as asker:
        edns = [opt(options=option(8, bytes((0, 1, 24, 0, 10, n & 255, n >> 8)))) for n in range(1000)]
        waiting = [asker.ask(NAME, edns=each) for each in edns]
        await upstream.heard(4)

        def unreachable(*_: object, **__: object) -> None:
            raise OSError("unreachable")

        (one,) = asker.forwarder.upstreams
        monkeypatch.setattr(one, "ask", unreachable)
        for exchange in list(asker.forwarder._exchanges.values())[:4]:
            asker.forwarder._finish(exchange, Failure.TIMEOUT)
        results = [await each.result() for each in waiting]
        assert results == [Failure.TIMEOUT] * 4 + [Failure.UNREACHABLE] * 996
