"""Forwarding to a real upstream that behaves, and to some that do not."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from dnsgw.message.question import Query, scan
from dnsgw.metrics import DnsMetrics, UpstreamOutcome
from dnsgw.upstream.address import UpstreamAddress, UpstreamProtocol
from dnsgw.upstream.exchange import Failure
from dnsgw.upstream.forwarder import Forwarder
from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_packets import opt, option, query
from tests.support.dns_servers import free_port

pytestmark = pytest.mark.anyio

RECORDS = {
    ("www.example.test", "A"): ["192.0.2.1"],
    ("big.example.test", "TXT"): [f"{n}-{'x' * 200}" for n in range(12)],
}


class Asker:
    """A forwarder, and its answers as awaitables."""

    def __init__(self, *ports: int, **limits: Any) -> None:
        self.metrics = DnsMetrics()
        endpoints = [(ip_address("127.0.0.1"), port) for port in ports]
        self.forwarder = Forwarder(endpoints, self.metrics, **{"random_case": False, **limits})

    def ask(self, name: str = "www.example.test", qtype: int = 1, *, edns: bytes = b"", tcp: bool = False) -> "Waiting":
        data = query(name, qtype, edns=edns)
        read = scan(data)
        future: asyncio.Future[bytes | Failure] = asyncio.get_running_loop().create_future()
        self.forwarder.ask(read, future.set_result, tcp=tcp)
        return Waiting(read, future)

    def count(self, outcome: UpstreamOutcome) -> int:
        return self.metrics.upstream[outcome]


class Waiting:
    def __init__(self, query: Query, future: asyncio.Future[bytes | Failure]) -> None:
        self.query = query
        self.future = future

    async def result(self) -> bytes | Failure:
        async with asyncio.timeout(5):
            return await self.future

    async def answer(self) -> bytes:
        result = await self.result()
        assert isinstance(result, bytes), result
        return result


@contextlib.asynccontextmanager
async def asking(*ports: int, **limits: Any) -> AsyncIterator[Asker]:
    asker = Asker(*ports, **limits)
    async with asyncio.TaskGroup() as tasks:
        asker.forwarder.attach(tasks.create_task)
        try:
            yield asker
        finally:
            asker.forwarder.close()
            assert asker.forwarder.waiting == 0


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving(RECORDS) as authority:
        yield authority


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port of loopback where nobody listens, and nobody else will."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held, socket.socket() as held_tcp:
        port = free_port()
        held.bind(("127.0.0.1", port))
        held_tcp.bind(("127.0.0.1", port))
        held.connect(("127.0.0.1", 9))  # it takes nothing from anybody else: a packet to it is refused
        yield port


def silent(asked: Asked) -> list[bytes]:
    return []


VARIANTS = [
    opt(512),
    opt(4096, z=0x4000),
    opt(options=option(10, b"12345678")),
    opt(options=option(8, b"\0\1\x18\0\x0a\1\2")),
    opt(options=option(3) + option(65001, b"x" * 50)),
]


@pytest.mark.parametrize("tcp", [False, True])
async def test_upstream_sees_nothing_that_does_not_change_the_answer(upstream: Authority, tcp: bool) -> None:
    async with asking(upstream.port, random_case=False) as asker:
        for do in (False, True):
            seen = set()
            for n, edns in enumerate([b"", *VARIANTS] if not do else [opt(do=True), opt(900, do=True, z=1)]):
                answer = await asker.ask("WwW.example.TEST", 16 + n, edns=edns, tcp=tcp).answer()
                asked = upstream.asked[-1]
                assert answer[12:] == asked.answer[12:]
                assert asked.tcp == tcp
                message = asked.message
                assert [int(each.otype) for each in message.options] == [10]
                assert (message.ednsflags, message.payload) == (0x8000 if do else 0, 1232)
                seen.add(asked.packet[2:28])
            assert seen == {query("www.example.test", flags=0x120, edns=opt())[2:28]}


async def test_a_signed_question_stays_as_it_is_and_goes_over_tcp(upstream: Authority) -> None:
    upstream.script = lambda asked: [asked.packet[:2] + b"\x81\x80" + b"\0\1" + bytes(6) + asked.question]
    record = b"\0" + struct.pack("!HHIH", 0xFF00, 255, 0, 4) + b"sign"
    data = query("WwW.example.TEST", edns=b"x")[:-1] + record
    async with asking(upstream.port) as asker:
        read = scan(data)
        future: asyncio.Future[bytes | Failure] = asyncio.get_running_loop().create_future()
        asker.forwarder.ask(read, future.set_result, tcp=False)
        assert isinstance(await Waiting(read, future).result(), bytes)
        (asked,) = upstream.asked
        assert asked.tcp
        assert asked.packet[2:] == data[2:]


async def test_ids_and_ports_are_drawn_anew(upstream: Authority) -> None:
    async with asking(upstream.port) as asker:
        for n in range(60):
            await asker.ask(f"n{n}.example.test").answer()
        ids = {asked.packet[:2] for asked in upstream.asked}
        ports = {asked.source[1] for asked in upstream.asked}
        assert len(ids) > 55
        assert len(ports) > 25  # 60 draws out of 64 sockets


async def test_the_same_question_is_asked_once_for_all(upstream: Authority) -> None:
    async with asking(upstream.port) as asker:
        spellings = ["www.example.test", "WWW.example.test", "www.EXAMPLE.test"]
        waiting = [asker.ask(name) for name in spellings]
        waiting += [asker.ask(edns=edns) for edns in VARIANTS]
        other = [
            asker.ask("www.example.test", 28),
            asker.ask(edns=opt(do=True)),
            asker.ask(tcp=True),
        ]
        answers = {await one.answer() for one in waiting}
        assert len(answers) == 1
        for one in other:
            assert await one.answer() not in answers
        assert len(upstream.asked) == 1 + len(other)
        assert asker.metrics.coalesced == 2 + len(VARIANTS)


async def test_packets_that_do_not_answer_the_question_are_ignored(upstream: Authority) -> None:
    def forge(asked: Asked) -> list[bytes]:
        good = asked.answer
        wrong_id = bytes([good[0] ^ 1]) + good[1:]
        wrong_name = good[:13] + b"x" + good[14:]
        stop = 12 + len(asked.question)
        wrong_type = good[: stop - 3] + b"\x02" + good[stop - 2 :]
        no_answer = good[:2] + bytes([good[2] & 0x7F]) + good[3:]
        return [b"x", wrong_id, [wrong_name, wrong_type][asked.rdtype == "AAAA"], no_answer, good]

    upstream.script = forge
    async with asking(upstream.port) as asker:
        for n, qtype in enumerate((1, 28)):
            assert (await asker.ask(qtype=qtype).answer())[34:] == upstream.asked[n].answer[34:]
        assert asker.count(UpstreamOutcome.UNWANTED) == 2
        assert asker.count(UpstreamOutcome.WRONG_ID) == 2
        assert asker.count(UpstreamOutcome.WRONG_QUESTION) == 4
        assert not any(asked.tcp for asked in upstream.asked)


async def test_packets_from_elsewhere_do_not_arrive(upstream: Authority) -> None:
    elsewhere = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def answer_from_elsewhere(asked: Asked) -> list[bytes]:
        elsewhere.sendto(asked.answer, asked.source)
        return []

    upstream.script = answer_from_elsewhere
    with elsewhere:
        async with asking(upstream.port, attempt_s=0.05, total_s=0.1) as asker:
            assert await asker.ask().result() is Failure.TIMEOUT
            assert asker.count(UpstreamOutcome.UNWANTED) == 0


async def test_a_lost_packet_is_sent_again_with_another_id(upstream: Authority) -> None:
    upstream.script = lambda asked: [asked.answer] if len(upstream.asked) > 1 else []
    async with asking(upstream.port, attempt_s=0.05, total_s=2) as asker:
        assert await asker.ask().answer() == upstream.asked[1].answer
        assert asker.count(UpstreamOutcome.TIMEOUT) == 1
        assert upstream.asked[0].name == upstream.asked[1].name
        assert upstream.asked[0].packet[:2] != upstream.asked[1].packet[:2]


async def test_the_next_upstream_is_asked_and_then_begun_with(upstream: Authority) -> None:
    async with serving(RECORDS) as second:
        upstream.script = silent
        async with asking(upstream.port, second.port, attempt_s=0.05, total_s=2) as asker:
            assert await asker.ask().answer() == second.asked[0].answer
            assert await asker.ask("n.example.test").answer() == second.asked[1].answer
            assert len(upstream.asked) == 1


async def test_a_late_answer_of_the_first_upstream_still_counts(upstream: Authority) -> None:
    async with serving(RECORDS) as second:
        second.script = silent
        # The first one answers the first attempt only when the second one has been asked.
        first: list[Asked] = []
        upstream.script = lambda asked: first.append(asked) or []  # type: ignore[func-returns-value]
        async with asking(upstream.port, second.port, attempt_s=0.2, total_s=40) as asker:
            waiting = asker.ask()
            await second.heard(1)
            upstream.send(first[0].answer, first[0].source)
            assert await waiting.answer() == first[0].answer
            assert len(upstream.asked) == 1


@pytest.mark.parametrize("tcp", [False, True])
async def test_silence_ends_in_a_timeout(upstream: Authority, tcp: bool) -> None:
    upstream.script = silent
    async with asking(upstream.port, attempt_s=0.1, total_s=0.5) as asker:
        assert await asker.ask(tcp=tcp).result() is Failure.TIMEOUT
        assert len(upstream.asked) >= 2


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_refused_question_fails_at_once(nobody: int, tcp: bool) -> None:
    async with asking(nobody, attempt_s=20, total_s=40) as asker:
        assert await asker.ask(tcp=tcp).result() is Failure.UNREACHABLE
        assert await asker.ask("n.example.test", tcp=tcp).result() is Failure.UNREACHABLE


@pytest.mark.parametrize("tcp", [False, True])
async def test_after_a_refusal_the_next_upstream_is_asked(nobody: int, upstream: Authority, tcp: bool) -> None:
    async with asking(nobody, upstream.port, attempt_s=20, total_s=40) as asker:
        assert await asker.ask(tcp=tcp).answer() == upstream.asked[0].answer


async def test_without_an_upstream_questions_fail_at_once() -> None:
    async with asking() as asker:
        assert await asker.ask().result() is Failure.NO_UPSTREAM


@pytest.mark.parametrize("rcode", [2, 5])
async def test_servfail_and_refused_lead_on_to_the_next(upstream: Authority, rcode: int) -> None:
    upstream.script = lambda asked: [asked.answer[:3] + bytes([0x80 | rcode]) + asked.answer[4:]]
    async with serving(RECORDS) as second, asking(upstream.port, second.port, attempt_s=20, total_s=40) as asker:
        assert await asker.ask().answer() == second.asked[0].answer
        assert asker.count(UpstreamOutcome.FAILED_OVER) == 1
        second.script = upstream.script
        assert (await asker.ask("n.example.test").answer())[3] == 0x80 | rcode


async def test_servfail_stays_when_the_next_is_silent(upstream: Authority) -> None:
    upstream.script = lambda asked: [asked.answer[:3] + b"\x82" + asked.answer[4:]]
    async with serving(RECORDS) as second:
        second.script = silent
        async with asking(upstream.port, second.port, attempt_s=0.05, total_s=40) as asker:
            assert (await asker.ask().answer())[3] == 0x82


async def test_too_many_waiting_questions_are_refused(upstream: Authority) -> None:
    upstream.script = silent
    async with asking(upstream.port, max_in_flight=3, attempt_s=20, total_s=40) as asker:
        waiting = [asker.ask(f"n{n}.example.test") for n in range(2)]
        waiting.append(asker.ask("n0.example.test"))  # who waits with another counts too
        assert await asker.ask("n0.example.test").result() is Failure.OVERLOADED
        assert await asker.ask("n9.example.test").result() is Failure.OVERLOADED
        asker.forwarder.close()
        assert [await one.result() for one in waiting] == [Failure.CLOSED] * 3


async def test_a_truncated_answer_is_passed_on(upstream: Authority) -> None:
    async with asking(upstream.port) as asker:
        answer = await asker.ask("big.example.test", 16, edns=opt()).answer()
        assert answer[2] & 2
        assert len(await asker.ask("big.example.test", 16, edns=opt(), tcp=True).answer()) > 2000


async def test_tcp_questions_share_a_connection(upstream: Authority) -> None:
    async with asking(upstream.port) as asker:
        waiting = [asker.ask(f"n{n}.example.test", tcp=True) for n in range(50)]
        for one in waiting:
            await one.answer()
        await asker.ask("again.example.test", tcp=True).answer()
        assert upstream.connections == 1


async def test_a_connection_that_upstream_closes_is_made_anew(upstream: Authority) -> None:
    upstream.close_after = 2
    async with asking(upstream.port) as asker:
        for n in range(5):
            await asker.ask(f"n{n}.example.test", tcp=True).answer()
        assert upstream.connections >= 3


async def test_questions_in_flight_survive_the_end_of_their_connection(upstream: Authority) -> None:
    upstream.close_after = 2
    async with asking(upstream.port, attempt_s=20, total_s=40) as asker:
        waiting = [asker.ask(f"n{n}.example.test", tcp=True) for n in range(3)]
        for one in waiting:
            await one.answer()
        assert upstream.connections == 2


async def test_a_connection_without_answers_is_not_trusted_again(upstream: Authority) -> None:
    upstream.script = lambda asked: [] if upstream.connections == 1 else [asked.answer]
    async with asking(upstream.port, attempt_s=0.05, total_s=5) as asker:
        await asker.ask(tcp=True).answer()
        assert upstream.connections == 2


async def test_waiting_questions_fail_at_the_end(upstream: Authority) -> None:
    upstream.script = silent
    async with asking(upstream.port, attempt_s=20, total_s=40) as asker:
        waiting = [asker.ask(), asker.ask(tcp=True), asker.ask()]
        await upstream.heard(2)
    assert [await one.result() for one in waiting] == [Failure.CLOSED] * 3


async def test_one_that_fails_does_not_cost_the_others_their_answer(
    upstream: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with asking(upstream.port) as asker:
        data = query("www.example.test")
        read = scan(data)
        asker.forwarder.ask(read, lambda _: 1 // 0, tcp=False)  # type: ignore[arg-type]
        await asker.ask().answer()
    assert "dns_answer_failed" in caplog.text


# Who is asked.


async def test_zones_have_upstreams_of_their_own(upstream: Authority) -> None:
    async with serving({("www.corp.test", "A"): ["192.0.2.2"]}) as corp, serving() as lab:
        zones = {
            "corp.test": [UpstreamAddress(ip_address("127.0.0.1"), corp.port)],
            "lab.corp.test.": [UpstreamAddress(ip_address("127.0.0.1"), lab.port, UpstreamProtocol.TCP)],
        }
        async with asking(upstream.port, zones=zones) as asker:
            names = {
                "www.corp.test": corp,
                "CORP.test": corp,
                "x.lab.corp.test": lab,
                "lab.corp.test": lab,
                "www.example.test": upstream,
                "xcorp.test": upstream,
                "test": upstream,
            }
            for name, server in names.items():
                before = len(server.asked)
                await asker.ask(name).answer()
                assert len(server.asked) == before + 1
                assert server.asked[-1].tcp == (server is lab)


async def test_the_root_can_be_a_zone(upstream: Authority) -> None:
    async with asking(zones={".": [UpstreamAddress(ip_address("127.0.0.1"), upstream.port)]}) as asker:
        await asker.ask("www.example.test").answer()
        await asker.ask("").answer()


async def test_another_is_asked_when_one_takes_long_and_the_first_answer_counts(upstream: Authority) -> None:
    async with serving(RECORDS) as slow:
        slow.script = silent
        async with asking(slow.port, upstream.port, race_s=0.01) as asker:
            for n in range(3):
                answer = await asker.ask(f"n{n}.example.test").answer()
                assert answer == upstream.asked[-1].answer
            assert asker.count(UpstreamOutcome.RACED) == 2
            # Twice was enough: the other one comes first now.
            assert len(slow.asked) == 2
