"""The parts of crossnet in the lab: their configuration files, keys and tokens, and the commands that run them."""

import json
import secrets
import sys
from pathlib import Path

import yaml

from crossnet.config.sections import DEFAULT_DOMAIN
from crossnet.lab.certificates import Authority
from crossnet.lab.topology import Plan
from discovery.api.tokens import format_entry, make_entry, make_token
from discovery.model.addresses import format_endpoint, parse_address
from discovery.model.mesh import Kind

ORDERS = "orders.shop.svc.cluster.local"
"""The service that network a imports by its own name."""

ROLES_OF_PARTS = {
    "discovery": "discovery_server",
    "turn": "turn",
    "dns": "dns",
    "relay": "relay",
    "gateway": "gateway",
}

_WRITES: dict[str, tuple[str, list[Kind]]] = {
    "turn": ("a", [Kind.TURN]),
    "dns": ("a", [Kind.VIP]),
    "relay": ("a", [Kind.RELAY]),
    "gateway": ("b", [Kind.ALLOCATION, Kind.GATEWAY]),
    "operator": ("b", [Kind.SERVICE]),
}
"""Which records of which network each part writes. Each has a token of its own that allows nothing else."""


class Parts:
    """The configurations of all parts, in one folder."""

    def __init__(self, folder: Path, plan: Plan, authority: Authority, coturn: bool) -> None:
        self._folder = folder
        self._plan = plan
        self._coturn = coturn
        self._loopback = ["127.0.0.0/8"] if plan.router is None else []
        self._turn_secret = self._secret("turn.secret", secrets.token_hex(16))
        self._key = self._secret("ab-1.key", secrets.token_hex(32))
        self._authority = authority
        self._tokens = {}
        entries = []
        for part, (network, kinds) in _WRITES.items():
            if part == "turn" and coturn:
                continue
            # coturn cannot publish its own record: turn_servers in the relay's file does that.
            more = [Kind.TURN] if part == "relay" and coturn else []
            names = ["**.cluster.local"] if Kind.SERVICE in kinds else []
            token = make_token()
            entry = make_entry(token, name=part, network=network, kinds=[*kinds, *more], names=names)
            entries.append(format_entry(entry))
            self._tokens[part] = self._secret(f"{part}.token", token)
        self._secret("tokens.yaml", "\n".join(entries))
        self.turn_password = (folder / "turn.secret").read_text().strip()
        for part in self.names:
            self._write(part)
        self._write("operator")

    @property
    def names(self) -> tuple[str, ...]:
        """The parts that are crossnet processes, in the order in which they start."""
        return ("discovery", *(() if self._coturn else ("turn",)), "dns", "relay", "gateway")

    def path(self, part: str) -> Path:
        """Return the path of a part's configuration file."""
        return self._folder / f"{part}.yaml"

    def command(self, part: str) -> list[str]:
        """Return the command that runs a part."""
        return [sys.executable, "-m", "crossnet", "run", "-c", str(self.path(part))]

    def service_command(self) -> list[str]:
        """Return the command with which network b's operator publishes the service in discovery."""
        endpoint = format_endpoint(parse_address(self._plan.service), self._plan.service_port)
        spec = {"name": ORDERS, "ports": {"443": [endpoint]}}
        return [
            *(sys.executable, "-m", "crossnet", "records", "-c", str(self.path("operator"))),
            *("put", "service", "orders", json.dumps(spec)),
        ]

    def coturn_command(self) -> list[str]:
        """Return the command that runs Debian's coturn with default settings, except for addresses, ports and a secret."""
        plan = self._plan
        empty = self._folder / "turnserver.conf"
        empty.touch()
        loopback = ["--allow-loopback-peers", "--cli-password=unused"] if self._loopback else []
        return [
            *("turnserver", "-c", str(empty), "-n", "--no-cli", "--no-tls", "--no-dtls"),
            *("--use-auth-secret", f"--static-auth-secret={self.turn_password}", f"--realm={DEFAULT_DOMAIN}"),
            *(f"--listening-ip={plan.turn}", f"--relay-ip={plan.turn}", f"--listening-port={plan.turn_port}"),
            *(f"--min-port={plan.turn_ports[0]}", f"--max-port={plan.turn_ports[1]}"),
            *(f"--userdb={self._folder / 'turndb'}", f"--pidfile={self._folder / 'turnserver.pid'}"),
            *("--log-file=stdout", "--simple-log", *loopback),
        ]

    def _write(self, part: str) -> None:
        plan = self._plan
        network = "b" if part in {"gateway", "operator"} else "a"
        document: dict[str, object] = {"network": network, "drain": 0}
        if part != "discovery":
            document |= {
                "discovery": [f"https://{plan.discovery}:{plan.discovery_port}"],
                "discovery_tls": {"ca": str(self._authority.path)},
                "token": {"file": self._tokens[part]},
            }
        if part != "operator":
            document["admin"] = format_endpoint(parse_address(plan.admin(part)[0]), plan.admin(part)[1])
        imports = [{"names": ["*.shop.svc.cluster.local"], "from": ["b"], "prefer": "remote"}]
        keys = {"ab-1": {"file": self._key, "from": "a", "to": "b"}}
        match part:
            case "discovery":
                server = self._authority.server("discovery", "discovery", [plan.discovery])
                document["discovery_server"] = {
                    "listen": f"{plan.discovery}:{plan.discovery_port}",
                    "store": "sqlite:discovery.db",
                    "tls": {"cert": str(server.certificate), "key": str(server.key)},
                    "tokens": {"file": "tokens.yaml"},
                    "turn_secrets": {"a": {"file": self._turn_secret}},
                    "allow_addresses": self._loopback,
                }
            case "turn":
                document["turn"] = {
                    "id": "turn-1",
                    "listen": f"{plan.turn}:{plan.turn_port}",
                    "relay_address": plan.turn,
                    "ports": f"{plan.turn_ports[0]}-{plan.turn_ports[1]}",
                    "secret": {"file": self._turn_secret},
                    "allow_peers": self._loopback,
                }
            case "dns":
                document |= {"import": imports}
                document["dns"] = {
                    "listen": f"{plan.dns}:{plan.dns_port}",
                    "upstream": f"{plan.turn}:{plan.dns_port}",  # nobody listens there: network a has no other names
                    "search": [],
                }
            case "relay":
                document |= {"import": imports, "keys": keys}
                document["relay"] = {
                    "id": "relay-1",
                    "listen": f"{plan.relay}:{plan.relay_port}",
                    "direct": self._loopback,
                }
                if self._coturn:
                    document["turn_servers"] = [
                        {
                            "id": "turn-1",
                            "url": f"turn:{plan.turn}:{plan.turn_port}?transport=tcp",
                            "relay_addresses": [plan.turn],
                            "port_min": plan.turn_ports[0],
                            "port_max": plan.turn_ports[1],
                        }
                    ]
            case "gateway":
                document |= {"keys": keys}
                document["gateway"] = {
                    "id": "gw-1",
                    "allow": [f"{plan.service}/32:{plan.service_port}"],
                    "turn": {"a": {"issue": True, "allow": self._loopback}},
                }
        self.path(part).write_text(yaml.safe_dump(document, sort_keys=False))

    def _secret(self, file: str, text: str) -> str:
        path = self._folder / file
        path.touch(0o600)
        path.write_text(text + "\n")
        return file
