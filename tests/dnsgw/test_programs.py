"""Third-party programs as clients: kdig, drill, delv, which validates, and dnsperf, which sends many questions."""

import asyncio
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import dns.dnssec
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.zone
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.dns_authority import Asked, Authority, serving
from tests.support.dns_meshes import DOMAIN, ORDERS, imports, mesh, relay
from tests.support.dns_packets import query
from tests.support.dns_servers import address, free_port, running
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.interop]

ADDRESS = f"p8443-10-1-0-5.b.{DOMAIN}"
VIEW = mesh(relay("10.0.0.9"))
BIG = [f"{n}-{'x' * 200}" for n in range(12)]


@pytest.fixture
async def upstream() -> AsyncIterator[Authority]:
    async with serving({("www.example.test", "A"): ["192.0.2.1"], ("big.example.test", "TXT"): BIG}) as authority:
        yield authority


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    text, _ = await process.communicate()
    return " ".join(text.decode().split())


KDIG = {
    f"{ADDRESS} A": ["status: NOERROR", "10.0.0.9"],
    f"{ADDRESS} AAAA": ["status: NOERROR", "ANSWER: 0", "SOA"],
    f"+tcp {ADDRESS}": ["10.0.0.9", "(TCP)"],
    f"+cookie {ADDRESS}": ["10.0.0.9", "COOKIE"],
    f"+nsid +padding +subnet=192.0.2.0/24 {ADDRESS}": ["10.0.0.9", "!CLIENT-SUBNET"],
    f"+edns nope.{DOMAIN}": ["NXDOMAIN", "EDNS"],
    "www.example.test": ["192.0.2.1"],
    "+bufsize=512 big.example.test TXT": ["ANSWER: 12", "(TCP)"],
}
DRILL = {
    f"{ADDRESS} A": ["rcode: NOERROR", "10.0.0.9"],
    f"-t {ADDRESS} A": ["10.0.0.9"],
    f"{ORDERS} SRV": ["p8443-orders.shop"],
    f"-D {ADDRESS} AAAA": ["rcode: NOERROR", "SOA"],
    "-x 10.0.0.9": ["rcode: NOERROR"],
    "www.example.test A": ["192.0.2.1"],
}


@pytest.mark.parametrize(
    ("program", "table"),
    [
        pytest.param(["kdig", "@{host}", "-p", "{port}"], KDIG, marks=pytest.mark.needs("kdig"), id="kdig"),
        pytest.param(["drill", "@{host}", "-p", "{port}"], DRILL, marks=pytest.mark.needs("drill"), id="drill"),
    ],
)
async def test_other_askers(upstream: Authority, program: list[str], table: dict[str, list[str]]) -> None:
    async with running(VIEW, upstream.port, imports=imports()) as server:
        host, port = address(server)
        failures = []
        for arguments, wanted in table.items():
            command = [word.format(host=host, port=port) for word in program]
            if program[0] == "drill":
                command = ["drill", "-p", str(port), *arguments.split(), f"@{host}"]
            else:
                command += arguments.split()
            text = await output(*command)
            wrong = [want for want in wanted if (want.removeprefix("!") in text) == want.startswith("!")]
            if wrong:
                failures.append(f"{arguments}: {wrong} in\n{text}\n")
        assert not failures, "\n".join(failures)


UNBOUND = """
server:
  interface: 127.0.0.1@{port}
  username: ""
  chroot: ""
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  module-config: "iterator"
  do-not-query-localhost: no
  qname-minimisation-strict: yes
  harden-below-nxdomain: yes
  local-zone: "local." nodefault
remote-control:
  control-enable: no
stub-zone:
  name: "local"
  stub-addr: 127.0.0.1@{ours}
"""


@pytest.mark.needs("unbound")
@pytest.mark.parametrize("prefer", ["local", "remote"])
async def test_a_resolver_that_asks_label_by_label_finds_imports(
    upstream: Authority, tmp_path: Path, prefer: str
) -> None:
    """Upstream knows none of the names above them."""
    async with running(VIEW, upstream.port, imports=imports(prefer)) as server:
        port = free_port()
        (tmp_path / "unbound.conf").write_text(UNBOUND.format(port=port, ours=address(server)[1]))
        process = await asyncio.create_subprocess_exec("unbound", "-d", "-c", str(tmp_path / "unbound.conf"))
        try:
            await eventually(lambda: answers_at(port))
            for name in ("bills.shop.svc.cluster.local", ORDERS):
                text = await output("dig", "@127.0.0.1", "-p", str(port), "+tries=1", "+noall", "+answer", name)
                assert text.endswith("10.0.0.9"), text
            minimised = {asked.name for asked in upstream.asked}
            assert "svc.cluster.local" in minimised
        finally:
            process.terminate()
            await process.wait()


def answers_at(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.1)
        try:
            sock.connect(("127.0.0.1", port))
            sock.send(query("localhost"))
            return bool(sock.recv(512))
        except OSError:
            return False


class Signed:
    """A zone with its signatures, as an upstream's script."""

    def __init__(self, *, lying: bool) -> None:
        self.lying = lying
        self.origin = dns.name.from_text("example.test.")
        text = "@ 60 IN SOA ns admin 1 2 3 4 60\n@ 60 IN NS ns\nns 60 IN A 192.0.2.53\nwww 60 IN A 192.0.2.1\n"
        text += "alias 60 IN CNAME www\nold 60 IN DNAME example.test.\n"
        self.zone = dns.zone.from_text(text, self.origin, relativize=False)
        key = ec.generate_private_key(ec.SECP256R1())
        self.key = dns.dnssec.make_dnskey(key.public_key(), dns.dnssec.Algorithm.ECDSAP256SHA256, flags=257)  # type: ignore[attr-defined]
        with self.zone.writer() as transaction:
            now = int(time.time())
            dns.dnssec.sign_zone(
                self.zone,
                transaction,
                keys=[(key, self.key)],
                inception=now - 3600,
                expiration=now + 3600,
                add_dnskey=True,
            )

    @property
    def anchor(self) -> str:
        words = self.key.to_text().split(maxsplit=3)
        return f'trust-anchors {{ example.test. static-key {" ".join(words[:3])} "{words[3]}"; }};'

    def __call__(self, asked: Asked) -> list[bytes]:
        reply = dns.message.make_response(asked.message, recursion_available=True)
        name, rdtype = reply.question[0].name, reply.question[0].rdtype
        old = dns.name.from_text("old", self.origin)
        if name.is_subdomain(old) and name != old:
            reply.answer += self.signed(old, dns.rdatatype.DNAME)
            target = name.relativize(old).concatenate(self.origin)
            reply.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", target.to_text()))
            name = target
        alias = self.zone.get_rrset(name, dns.rdatatype.CNAME)
        if alias is not None and rdtype != dns.rdatatype.CNAME:
            reply.answer += self.signed(name, dns.rdatatype.CNAME)
            name = alias[0].target
        found = self.signed(name, rdtype)
        reply.answer += found
        if not found:
            reply.authority += self.signed(self.origin, dns.rdatatype.SOA)
            for owner in sorted(self.zone.nodes):
                reply.authority += self.signed(owner, dns.rdatatype.NSEC)
            if name not in self.zone.nodes:
                reply.set_rcode(dns.rcode.NXDOMAIN)
        if self.lying:
            lie = dns.rrset.from_text("bank.test.", 60, "IN", "A", "192.0.2.66")
            for section in (reply.authority, reply.additional, *([reply.answer] if reply.answer else [])):
                section.append(lie)
        return [reply.to_wire()]

    def signed(self, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> list[dns.rrset.RRset]:
        """What there is of this type, and its signatures."""
        pairs = ((rdtype, dns.rdatatype.NONE), (dns.rdatatype.RRSIG, rdtype))
        found = [self.zone.get_rrset(name, kind, covers) for kind, covers in pairs]
        return [rrset for rrset in found if rrset is not None]


VALID = {
    "www.example.test A": ["fully validated", "192.0.2.1"],
    "alias.example.test A": ["fully validated", "192.0.2.1", "CNAME"],
    "www.old.example.test A": ["fully validated", "192.0.2.1", "DNAME"],
    "www.example.test AAAA": ["ncache nxrrset", "negative response, fully validated"],
    "nope.example.test A": ["ncache nxdomain", "negative response, fully validated"],
    "example.test SOA": ["fully validated"],
}


@pytest.mark.needs("delv")
@pytest.mark.parametrize("lying", [False, True], ids=["honest", "lying besides"])
async def test_signed_answers_can_be_validated_through_us(upstream: Authority, tmp_path: Path, lying: bool) -> None:
    signed = Signed(lying=lying)
    upstream.script = signed
    anchors = tmp_path / "anchors"
    anchors.write_text(signed.anchor)
    async with running(VIEW, upstream.port) as server:
        host, port = address(server)
        validating = ("delv", f"@{host}", "-p", str(port), "-a", str(anchors), "+root=example.test")
        for asked, wanted in VALID.items():
            for _ in range(2):  # upstream's answer, and the kept one
                text = await output(*validating, *asked.split())
                assert [want for want in wanted if want not in text] == [], f"{asked}: {text}"
                assert "192.0.2.66" not in text
        text = await output("delv", f"@{host}", "-p", str(port), "-i", ADDRESS, "A")
        assert "10.0.0.9" in text  # ours is unsigned, and only for those who do not insist


@pytest.mark.needs("dnsperf")
@pytest.mark.parametrize("mode", ["udp", "tcp"])
async def test_a_thousand_questions_at_once_lose_none(upstream: Authority, tmp_path: Path, mode: str) -> None:
    names = [ADDRESS, "www.example.test", f"nope.{DOMAIN}", f"b.{DOMAIN}", "localhost"]
    (tmp_path / "questions").write_text(
        "".join(f"{name} {kind}\n" for name in names for kind in ("A", "AAAA", "HTTPS"))
    )
    async with running(VIEW, upstream.port) as server:
        host, port = address(server)
        command = [
            "dnsperf",
            "-s",
            host,
            "-p",
            str(port),
            "-m",
            mode,
            "-d",
            str(tmp_path / "questions"),
            "-n",
            "100",
            "-e",
        ]
        text = await output(*command, "-c", "8", "-t", "10")
        assert "Queries completed: 1500 (100.00%)" in text, text
        assert "SERVFAIL" not in text
