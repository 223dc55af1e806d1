"""The test run of the lab: clients send requests, and the results are compared with the expected ones."""

import time
from typing import Any

from crossnet.config.sections import DEFAULT_DOMAIN
from crossnet.lab.account import Account, Check, Hop
from crossnet.lab.clients import Attempt, Clients, DnsAnswer
from crossnet.lab.parts import ORDERS
from crossnet.lab.stage import Stage

FAST_MS = 2000.0
"""Limit for a refusal, including the start of the client's process: it must not come from a timeout, the shortest of which is
3 s."""

ISOLATION_TIMEOUT_S = 0.5
LOG_TIMEOUT_S = 3.0
UNKNOWN_NETWORK = "nowhere"


class Scene:
    """The checks of one run: every client requests every name."""

    def __init__(self, stage: Stage, account: Account) -> None:
        self._stage = stage
        self._plan = stage.plan
        self._account = account
        self._clients = Clients(stage.topology, stage.authority.path, stage.client, stage.folder)
        self._versions = self._clients.versions()
        self._unknown = stage.compact_name.replace(f".b.{DEFAULT_DOMAIN}", f".{UNKNOWN_NETWORK}.{DEFAULT_DOMAIN}")

    def play(self) -> None:
        """Run all checks and fill in the report."""
        self._place()
        self._isolation()
        answers = {name: self._resolve(name) for name in (self._stage.compact_name, self._stage.address_name, ORDERS)}
        attempts = [self._served(client, name) for name in answers for client in self._clients.available]
        self._unknown_network()
        self._certificates(attempts)
        self._hops(attempts[0], answers[attempts[0].name])
        self._advice()

    def _place(self) -> None:
        plan = self._plan
        turn = {"embedded": "the embedded one", "coturn": "Debian's coturn"}[self._stage.turn]
        rows = [
            (
                "network a",
                f"clients {plan.client}, relay {plan.relay}:{plan.relay_port}, dnsgw {plan.dns}:{plan.dns_port},",
            ),
            (
                "",
                f"TURN server {plan.turn}:{plan.turn_port} ({turn}), discovery {plan.discovery}:{plan.discovery_port}",
            ),
            (
                "network b",
                f"gateway {plan.gateway}, service {plan.service}:{plan.service_port} ({self._stage.service_kind}, mutual TLS)",
            ),
        ]
        if plan.router is not None:
            rows.append(("between", f"a router that masquerades b as {plan.router} and drops what a sends into b"))
        self._account.networks = rows

    def _isolation(self) -> None:
        if self._plan.router is None:
            return
        reached = self._clients.reach(self._plan.service, self._plan.service_port, ISOLATION_TIMEOUT_S)
        dropped = self._stage.topology.dropped()
        self._check(
            f"network a cannot reach {self._plan.service}:{self._plan.service_port} itself",
            not reached and bool(dropped),
            f"{dropped} packets dropped" if not reached else "a connection from a into b came about",
        )
        mapped = (self._stage.registration().get("mapped") or [None])[0]
        self._check(
            "network b is behind NAT",
            mapped == self._plan.router,
            f"the TURN server sees its gateway come from {mapped}",
        )

    def _resolve(self, name: str) -> DnsAnswer:
        try:
            answer = self._clients.resolve(name)
        except OSError as error:
            answer = DnsAnswer(rcode=str(error), addresses=(), ttl_s=None, ms=0.0)
        self._check(f"dnsgw answers {name} with the relay", answer.addresses == (self._plan.relay,), _told(answer))
        return answer

    def _served(self, client: str, name: str) -> Attempt:
        relay = None if self._clients.resolve_themselves else self._plan.relay
        attempt = self._clients.ask(client, name, relay)
        ok = attempt.status == 0 and attempt.seen is not None and attempt.seen.serial == self._stage.client.serial
        if attempt.status:
            detail = attempt.said or f"exit code {attempt.status}"
        else:
            detail = "the service saw the client's own certificate" if ok else f"the service saw {attempt.seen}"
        self._check(f"{client} reaches {name}", ok, detail)
        result = "served, certificate verified" if ok else f"FAILED: {detail}"
        self._account.got.append((self._versions[client], name, result, attempt.ms))
        return attempt

    def _unknown_network(self) -> None:
        answer = self._clients.resolve(self._unknown)
        self._check(f"dnsgw says NXDOMAIN for {self._unknown}", answer.rcode == "NXDOMAIN", _told(answer))
        for client in self._clients.available:
            # The name does not resolve, so the client is told the relay's address, as if it had an old answer.
            attempt = self._clients.ask(client, self._unknown, self._plan.relay)
            ok = attempt.unrecognized_name and attempt.ms < FAST_MS
            self._check(f"{client} is refused {self._unknown} with alert unrecognized_name, fast", ok, attempt.said)
            result = "refused: TLS alert unrecognized_name" if ok else f"FAILED: {attempt.said}"
            self._account.got.append((self._versions[client], self._unknown, result, attempt.ms))

    def _certificates(self, attempts: list[Attempt]) -> None:
        found = [attempt.seen for attempt in attempts if attempt.seen is not None]
        if not found:
            return
        serial = self._stage.client.serial
        same = sum(seen.serial == serial for seen in found)
        self._account.seen = (
            f"{found[0].subject}, serial {serial:x}: in {same} of {len(attempts)} requests the one whose key only the\n"
            "  clients hold. So each TLS connection went from client to service; what lies between moved its bytes."
        )

    def _hops(self, attempt: Attempt, answer: DnsAnswer) -> None:
        relay = self._logged("relay", "sni", attempt.name)
        gateway = self._logged("gateway", "stream", relay.get("stream", ""))
        self._check(
            "relay and gateway tell of the same stream, ended well",
            relay.get("reason") == gateway.get("reason") == "ok",
            f"{relay.get('stream')}: {relay.get('reason')}, {gateway.get('reason')}",
        )
        plan, registration = self._plan, self._stage.registration()
        relayed = ":".join(map(str, registration.get("relayed") or ("?",)))
        whence = f" (seen as {plan.router})" if plan.router else ""
        self._account.request = f"{attempt.client} in network a asks for {attempt.name}"
        self._account.hops = [
            Hop(part="dnsgw", address=f"{plan.dns}:{plan.dns_port}", did=f"says {_told(answer)}", ms=answer.ms),
            Hop(
                part="relay",
                address=f"{plan.relay}:{plan.relay_port}",
                did=f"reads the name in the ClientHello; {relay.get('route')} route to {relay.get('target')}",
                ms=relay.get("ms_route"),
            ),
            Hop(
                part="TURN server",
                address=f"{plan.turn}:{plan.turn_port}",
                did=f"relayed address {relayed}: the gateway's, made in advance from inside network b",
            ),
            Hop(
                part="gateway",
                address=f"{plan.gateway}{whence}",
                did=f"proves the signature of key {gateway.get('key_id')}, dials the service",
                ms=gateway.get("ms_connect"),
            ),
            Hop(part="relay", address="", did="has the service at the far end", ms=relay.get("ms_connect")),
            Hop(
                part="service",
                address=f"{plan.service}:{plan.service_port}",
                did="first byte of its TLS answer at the relay",
                ms=relay.get("ms_first_byte"),
            ),
            Hop(
                part="whole stream",
                address="",
                did=f"{relay.get('bytes_up')} bytes up, {relay.get('bytes_down')} down, stream {relay.get('stream')}",
                ms=relay.get("ms_total"),
            ),
        ]

    def _logged(self, part: str, field: str, value: str) -> dict[str, Any]:
        """Return the log event of a stream. It is written when the stream ends, perhaps a moment after the client has ended."""
        deadline = time.monotonic() + LOG_TIMEOUT_S
        while time.monotonic() < deadline:
            for event in self._stage.streams(part):
                if event.get(field) == value:
                    return event
            time.sleep(0.03)
        return {}

    def _advice(self) -> None:
        unproven = [
            "that it is fast, or stays up for long: `make bench` measures, `make test` breaks things on purpose",
            "TLS between gateway and TURN server (turns:), and any NAT but this machine's own",
        ]
        if self._plan.router is None:
            unproven = [
                "isolation: both networks are this machine's loopback interface, and nothing keeps a from b",
                "NAT: the gateway comes from no other address than the rest",
                f"that clients find the relay by their own resolver: the lab asked dnsgw, on port {self._plan.dns_port}, for them",
                *unproven,
            ]
        self._account.unproven = unproven

    def _check(self, what: str, ok: bool, detail: str = "") -> None:
        self._account.checks.append(Check(what=what, ok=ok, detail=detail))

    def command_line(self, client: str) -> str:
        """Return the command that a person would type in network a."""
        relay = None if self._clients.resolve_themselves else self._plan.relay
        return self._clients.command_line(client, self._stage.compact_name, relay)


def _told(answer: DnsAnswer) -> str:
    if answer.addresses:
        return f"{', '.join(answer.addresses)} (A, TTL {answer.ttl_s} s)"
    return answer.rcode if answer.rcode != "NOERROR" else "no address"
