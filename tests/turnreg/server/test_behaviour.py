"""One table of behaviour, run against Debian's coturn and against the embedded server.

Each case is a small program that returns what it saw. Where the two differ the table says so: those differences are why the
embedded server exists, and why the stream protocol may not rely on a FIN, an early byte or a second bind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.coturn import coturn
from tests.support.embedded_turn import embedded
from tests.turnreg.server import control_cases, datagram_cases, stream_cases
from tests.turnreg.server.situations import Server
from turnreg.server import Limits
from turnreg.stun.message import FAMILY_IPV6, TRANSPORT_UDP, Attribute, MessageClass


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case and its expected results. `coturn_options` and `embedded_options` bring both servers into the same state."""

    run: Callable[[Server], object]
    coturn: object
    embedded: object
    coturn_options: tuple[str, ...] = ()
    embedded_options: dict[str, Any] = field(default_factory=dict)
    over_udp: bool = False


class Either:
    """Equal to any of these, where the result depends on timing."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = outcomes

    def __eq__(self, other: object) -> bool:
        return other in self.outcomes

    def __hash__(self) -> int:
        return hash(self.outcomes)

    def __repr__(self) -> str:
        return f"Either{self.outcomes}"


def same(run: Callable[[Server], object], seen: object, *options: str, **more: Any) -> Case:
    return Case(run=run, coturn=seen, embedded=seen, coturn_options=options, embedded_options=more)


def over_udp(run: Callable[[Server], object], seen: object) -> Case:
    return Case(run=run, coturn=seen, embedded=seen, embedded_options=UDP, over_udp=True)


UDP = {"udp_allocations": True, "listen_udp": (("127.0.0.1", 0),)}
SHORT_LIFE: dict[str, Any] = {"limits": Limits(default_lifetime_s=1.0, max_lifetime_s=1.0)}
GOOD = (0, b"hello")
REST = ("--use-auth-secret", "--static-auth-secret=north", "--static-auth-secret=south")
DENIED: dict[str, Any] = {
    "coturn_options": ("--relay-ip=127.0.0.1", "--relay-ip=::1", "--denied-peer-ip=127.0.0.0-127.255.255.255"),
    "embedded_options": {"relay_addresses": ("127.0.0.1", "::1"), "allowed_peers": ()},
}

TABLE: dict[str, Case] = {
    "challenge": same(control_cases.challenge, (401, "lab", True, False)),
    "wrong password": same(control_cases.wrong_password, 401),
    "unknown user": same(control_cases.unknown_user, 401),
    "stale nonce": same(control_cases.stale_nonce, (438, True, 0), "--stale-nonce=1", nonce_lifetime_s=1.0),
    "REST name that ends": Case(
        run=control_cases.rest_name_that_ends,
        coturn=(0, 0, 441),
        embedded=(401, 0, 0),
        coturn_options=REST,
        embedded_options={"users": {}, "secrets": ("north",)},
    ),
    "second REST secret": same(control_cases.rest_secret("south"), 0, *REST, users={}, secrets=("north", "south")),
    "wrong REST secret": same(control_cases.rest_secret("east"), 401, *REST, users={}, secrets=("north", "south")),
    "allocate": same(control_cases.allocate, (MessageClass.SUCCESS, "127.0.0.1", True, 600)),
    "lifetimes": same(control_cases.lifetimes, [600, 3600, 3600]),
    "second allocate": same(control_cases.second_allocate, 437),
    "retransmitted allocate": same(control_cases.retransmitted_allocate, True),
    "unknown attribute": same(control_cases.allocate_with(0x7777, b"x"), (420, (0x7777,))),
    "even port": same(control_cases.allocate_with(Attribute.EVEN_PORT, b"\x80"), (400, ())),
    "dont fragment": same(control_cases.allocate_with(Attribute.DONT_FRAGMENT, b""), (400, ())),
    "family not supported": same(
        control_cases.allocate_with(Attribute.REQUESTED_ADDRESS_FAMILY, bytes((FAMILY_IPV6, 0, 0, 0))), (440, ())
    ),
    "udp allocation": Case(run=control_cases.transport(TRANSPORT_UDP), coturn=0, embedded=442),
    "unknown transport": Case(run=control_cases.transport(132), coturn=400, embedded=442),
    "no transport": same(control_cases.no_transport, 400),
    "refresh without allocation": same(control_cases.refresh_without_allocation, 437),
    "quota": same(control_cases.quota, (486, True, 0), "--user-quota=2", limits=Limits(max_allocations_per_account=2)),
    "refresh 0": same(control_cases.refresh_zero, (0, 0, True, True, True, b"")),
    "expiry": same(control_cases.expiry, (True, True, True, b""), "--max-allocate-lifetime=1", **SHORT_LIFE),
    "control lost": same(control_cases.control_lost, (True, True, True)),
    "control closed": same(control_cases.control_closed, (True, True, True)),
    "other user": same(control_cases.other_user, (441, 441), "--user=v:q"),
    "permissions": same(control_cases.permissions, (0, 400, 443)),
    # CVE-2026-27624, mended in coturn 4.9
    "loopback, IPv4-mapped": Case(
        run=control_cases.loopback_spelt("::ffff:127.0.0.1"), coturn=0, embedded=403, **DENIED
    ),
    "loopback, NAT64": Case(run=control_cases.loopback_spelt("64:ff9b::7f00:1"), coturn=0, embedded=403, **DENIED),
    "peer without permission": same(control_cases.peer_without_permission, (True, True)),
    "expired permission": same(
        control_cases.expired_permission,
        (True, b"still here"),
        "--permission-lifetime=1",
        limits=Limits(permission_lifetime_s=1.0),
    ),
    "forbidden methods": Case(run=control_cases.forbidden_methods, coturn=(403, 447), embedded=(403, 403)),
    "send indication": same(control_cases.send_indication, 0),
    "attempt and bind": same(
        stream_cases.attempt_and_bind, (MessageClass.INDICATION, False, True, b"to the client", b"to the peer")
    ),
    "early 60 kB": same(stream_cases.early(60_000), (True, True)),
    "early 100 kB": Case(run=stream_cases.early(100_000), coturn=(False, True), embedded=(True, True)),
    "early 4 MB": Case(run=stream_cases.early(4_000_000), coturn=(False, True), embedded=(True, True)),
    "early in 20 writes": Case(run=stream_cases.dribbled, coturn=16, embedded=20),
    "pipelined behind bind": Case(run=stream_cases.pipelined_behind_bind, coturn=b"late", embedded=b"early, late"),
    "peer sends 1 MB and closes": Case(
        run=stream_cases.close_after(1_000_000, "peer"), coturn=Either("truncated", "reset"), embedded="fin"
    ),
    "client sends 1 MB and closes": Case(
        run=stream_cases.close_after(1_000_000, "client"), coturn=Either("truncated", "reset"), embedded="fin"
    ),
    "half-close": Case(
        run=stream_cases.half_close,
        coturn=(b"question", "reset", True),
        embedded=(b"question", "fin", (b"answer", "fin")),
    ),
    "peer resets": same(stream_cases.peer_reset, (b"", "reset")),
    "backpressure": same(stream_cases.backpressure, (True, True)),
    "unsigned bind": Case(
        run=stream_cases.failed_bind(stream_cases.unsigned), coturn=("reset", "reset"), embedded=((401, "fin"), GOOD)
    ),
    "bind with a wrong password": Case(
        run=stream_cases.failed_bind(stream_cases.with_wrong_password),
        coturn=("reset", "reset"),
        embedded=((401, "fin"), GOOD),
    ),
    "bind with a stale nonce": Case(
        run=stream_cases.failed_bind(stream_cases.with_stale_nonce),
        coturn=("reset", "reset"),
        embedded=((438, "fin"), GOOD),
    ),
    "bind without an id": Case(
        run=stream_cases.failed_bind(stream_cases.without_id), coturn=("reset", GOOD), embedded=((400, "fin"), GOOD)
    ),
    "bind of an unknown id": Case(run=stream_cases.bind_of_unknown_id, coturn="reset", embedded=(400, "fin")),
    "second bind": Case(run=stream_cases.second_bind, coturn=("reset", b"hello"), embedded=(400, b"hello")),
    "bind on the control connection": same(stream_cases.bind_on_control, 400),
    "many at once": same(stream_cases.many_at_once, (100, 100)),
    "binding": same(control_cases.binding_request, True),
    "requests in one write": same(control_cases.requests_in_one_write, [0, 0, 0]),
    "datagrams by indications": same(datagram_cases.by_indications, (b"to the peer", True, True), **UDP),
    "datagrams by channel": same(datagram_cases.by_channel, (0, b"hello", (0x4000, b"odd")), **UDP),
    "datagrams over udp": over_udp(datagram_cases.over_udp, (0, b"hello", (0x4000, b"odd"))),
    "channel numbers": same(datagram_cases.channel_numbers, [400, 400, 0, 400, 400], **UDP),
    "datagrams without permission": same(datagram_cases.without_permission, (b"!", b"!"), **UDP),
    "pair of ports": same(datagram_cases.pair_of_ports, (0, True), **UDP),
    "streams over udp": over_udp(datagram_cases.streams_over_udp, 400),
    "allocate again over udp": over_udp(datagram_cases.allocate_again_over_udp, (True, 437)),
    # coturn keeps an allocation that was given back for another second.
    "refresh 0 over udp": Case(
        run=datagram_cases.refresh_zero_over_udp,
        coturn=(0, 0),
        embedded=(0, 437),
        embedded_options=UDP,
        over_udp=True,
    ),
    "size of a challenge": over_udp(datagram_cases.challenge_size, True),
    "active connect": same(datagram_cases.active_connect, (True, b"hello", [446, 447]), active_connect=True),
    "connect beside peers": same(datagram_cases.connect_beside_peers, b"hello", active_connect=True),
    "request byte by byte": same(control_cases.request_byte_by_byte, 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_embedded(name: str) -> None:
    case = TABLE[name]
    with embedded(**case.embedded_options) as server:
        if case.over_udp:
            server.port = server.udp[1]
        assert case.run((server.address, server.port)) == case.embedded


@pytest.mark.interop
@pytest.mark.needs("turnserver")
@pytest.mark.parametrize("name", TABLE)
def test_coturn(name: str) -> None:
    case = TABLE[name]
    with coturn(extra=case.coturn_options) as server:
        assert case.run((server.address, server.port)) == case.coturn
