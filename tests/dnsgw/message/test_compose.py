"""Composed replies."""

import dns.flags
import dns.message
import pytest

from dnsgw.message.compose import joined, retargeted, with_option
from dnsgw.message.question import scan
from dnsgw.message.upstream_reply import Message
from tests.dnsgw.message.test_upstream_reply import ASKED, wire
from tests.support.dns_packets import name, option, query, question


def test_a_chain_is_joined_to_another_answer() -> None:
    end = """id 9
flags QR AA RD RA
edns 0
;QUESTION
b.svc.mesh.internal. IN A
;ANSWER
b.svc.mesh.internal. 5 IN A 10.0.0.9
;AUTHORITY
mesh.internal. 5 IN SOA svc.mesh.internal. nobody.invalid. 1 2 3 4 5
"""
    whole = dns.message.from_wire(joined(ASKED, Message(wire()), 2, Message(wire(end))))
    assert [str(rrset).lower() for rrset in whole.answer] == [
        "www.example.test. 300 in cname a.example.test.",
        "a.example.test. 200 in cname b.svc.mesh.internal.",
        "b.svc.mesh.internal. 5 in a 10.0.0.9",
    ]
    assert str(whole.authority[0]) == "mesh.internal. 5 IN SOA svc.mesh.internal. nobody.invalid. 1 2 3 4 5"
    assert whole.id == ASKED.id
    assert not whole.flags & (dns.flags.AA | dns.flags.AD)
    cut = dns.message.from_wire(joined(ASKED, Message(wire()), 1, Message(wire(end))))
    assert len(cut.answer) == 2


@pytest.mark.parametrize(
    "rtype", ["NS ns.x.test.", "MX 5 mx.x.test.", "PTR p.x.test.", 'TXT "x"', "SRV 0 0 1 s.x.test."]
)
def test_records_stand_alone_without_compression(rtype: str) -> None:
    kind = rtype.split()[0]
    text = f"id 1\nflags QR\n;QUESTION\nx.test. IN {kind}\n;ANSWER\nx.test. 9 IN {rtype}\n"
    query_of = scan(query("y.test"))
    whole = dns.message.from_wire(joined(query_of, Message(wire(text)), 0, Message(wire(text))))
    assert str(whole.answer[0]) == f"x.test. 9 IN {rtype}"


def test_a_question_about_another_name() -> None:
    other = retargeted(ASKED, name("b.svc.mesh.internal"))
    assert other.question == question("b.svc.mesh.internal")
    assert other.labels == (0, 2, 6, 11)
    assert other.edns is ASKED.edns


def test_an_option_is_added_to_a_reply() -> None:
    reply = Message(wire()).as_reply(ASKED, option(65001, b"a"))
    more = dns.message.from_wire(with_option(reply, option(65002, b"bc")))
    assert [option.otype for option in more.options] == [65001, 65002]
    bare = Message(wire()).as_reply(scan(query("www.example.test")))
    assert with_option(bare, option(65002, b"bc")) == bare
