"""Fuzz the resolver: any bytes as a client's packet, and any bytes as upstream's answer. Nothing raises, nothing grows.

    python -m pip install '.[fuzz]'
    python tests/fuzz/datagram.py -max_total_time=60 tests/fuzz/datagram

The first byte selects what the rest is: below 128, a client's packet; otherwise, upstream's answer to a question. The id and the
question of an answer are replaced by matching ones, so that it is parsed, and each question is for a new name, so that no cache
answers it. Without atheris, only the corpus is run, as in the tests.
"""

# ruff: noqa: E402 - instrumented modules have to be imported first
import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
atheris: Any = None
if __name__ == "__main__":  # not in the tests, which run many packets: instrumented code takes twice as long
    with contextlib.suppress(ImportError):
        import atheris

if atheris is not None:
    with atheris.instrument_imports(include=["dnsgw", "discovery.model.names"]):
        from dnsgw import DnsConfig, DnsMetrics, Outcome
        from dnsgw.resolver import Resolver
else:
    from dnsgw import DnsConfig, DnsMetrics, Outcome
    from dnsgw.resolver import Resolver

from discovery.model.imports import ImportRule, Imports
from discovery.model.mesh import Kind, Mesh, NetworkSpec, Record, RelaySpec, ServiceSpec
from dnsgw.upstream.exchange import Failure
from dnsgw.upstream.verify import Verdict, judge

LOOPBACK = b"\x7f\0\0\1"


def question(number: int) -> tuple[bytes, bytes]:
    """Return a new question, without and with EDNS."""
    asked = b"\x08%08x\x04test\0\0\1\0\1" % (number & 0xFFFFFFFF)
    head = b"\0\7\1\0\0\1\0\0\0\0\0"
    return head + b"\0" + asked, head + b"\1" + asked + b"\0\0\x29\4\xd0\0\0\x80\0\0\0"


MESH = Mesh.of(
    [
        Record(kind=Kind.NETWORK, network="b", id="b", revision=1, spec=NetworkSpec()),
        Record(
            kind=Kind.RELAY,
            network="a",
            id="r",
            revision=2,
            spec=RelaySpec(addresses=["10.0.0.9", "fd00::9"], ports=[443]),
        ),
        Record(
            kind=Kind.SERVICE,
            network="b",
            id="s",
            revision=3,
            spec=ServiceSpec(name="orders.shop.svc.cluster.local", ports={"443": []}),
        ),
    ]
)


class _Upstream:
    """Replaces the forwarder: it answers immediately with `answer`."""

    answer = b""

    def ask(self, query: Any, done: Any, *, tcp: bool) -> None:
        answer = b"\0\0" + self.answer[:10].ljust(10, b"\0") + query.question + self.answer[10:]
        verdict, _ = judge(
            answer,
            query.question,
            spelled=True,
            edns=True,
            client_cookie=b"12345678",
            expects_cookie=False,
            stream=tcp,
        )
        done(answer if verdict is Verdict.ANSWER else Failure.TIMEOUT)


class Target:
    """The resolver as a function of bytes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.metrics = DnsMetrics()
        rule = ImportRule(names=("*.shop.svc.cluster.local",), sources=("b",))
        config = DnsConfig(network="a", listen=(), imports=Imports([rule]), cookie_secret=bytes(16))
        self.resolver = Resolver(config, self.metrics)
        self.upstream = _Upstream()
        self.asked = 0
        self.resolver.attach(loop, self.upstream)  # type: ignore[arg-type]
        self.resolver.apply(MESH)

    def run(self, data: bytes, ways: tuple[bool, ...] = (False, True)) -> None:
        """Run one input over UDP and TCP, or over one of them (False, True). Raises AssertionError if a reply is wrong."""
        replies: list[bytes] = []

        def send(reply: bytes, where: Any) -> None:
            replies.append(reply)
            assert where == "here"

        if not data or data[0] < 128:
            packets, self.upstream.answer = (data[1:],), b"\x81\x83\0\1\0\0\0\0\0\0"
        else:
            self.asked += 1
            packets, self.upstream.answer = question(self.asked), data[1:]
        for packet in packets:
            for tcp in ways:
                before = len(replies)
                self.resolver.handle(packet, LOOPBACK, send, "here", tcp)
                assert len(replies) == before + 1, "one reply per packet"
                reply = replies[-1]
                assert len(reply) <= (65535 if tcp else 1232), "too long"
                assert not reply or reply[:2] == packet[:2], "wrong id"
                assert not reply or reply[2] & 0x80, "the QR bit is not set"
        assert self.metrics.queries[Outcome.ERROR] == 0, "an exception was raised"


def main() -> None:
    """Fuzz, or run only the corpus if atheris is not installed."""
    loop = asyncio.new_event_loop()
    target = Target(loop)
    if atheris is None:
        for path in sorted((Path(__file__).parent / "datagram").iterdir()):
            target.run(path.read_bytes())
        return
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
