"""Two configuration files that contain every section, and for every field another valid value.

    for field in fields():
        document = field.changed(files.documents[field.part])

The fields come from the sections' own dataclasses. One whose type is known here gets its other value by that; any other has to
stand in `OTHERS`, so that no new field is left out: `another()` fails for it and says so.
"""

import copy
import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crossnet.config.schema import Leaf, fields_of, unwrapped
from crossnet.config.sections import Config
from crossnet.lab.certificates import Authority
from discovery.api.tokens import format_entry, make_entry, make_token
from discovery.model.mesh import Kind
from discovery.model.validation import child
from tests.support.running import free_port

Document = dict[str, Any]

BAD = [["bad"]]
"""No field takes a list in a list."""

OF_B = frozenset({"gateway", "publisher", "handover"})
"""What stands in network b's file; the rest is changed in that of network a."""

BY_TYPE: dict[str, Callable[[Any], Any]] = {
    "true or false": lambda now: not now,
    "a whole number 0-1000000": lambda now: now + 1,
    "a whole number 1-65535": lambda now: now + 1,
    "a whole number 1-16": lambda now: now + 1,
    "a port 1-65535": lambda now: now - 1,
    "a duration such as 5s, 250ms or 2m": lambda now: "7s" if now != "7s" else "8s",
    "a duration such as 5s, or 0": lambda now: "7s" if now != "7s" else "8s",
    "a duration such as 5s": lambda now: "7s" if now != "7s" else "8s",
    "a size such as 64KiB": lambda _: "48KiB",
    "a size such as 1MiB, at least 512KiB": lambda _: "2MiB",
    "a size such as 32MiB, or 0": lambda _: "48MiB",
    "a share such as 50%, from 1% to 100%": lambda _: "40%",
    "ip:port to listen on": lambda _: f"127.0.0.1:{free_port()}",
    "ip:port": lambda _: "10.0.0.77:77",
    "an id (a-z, 0-9, inner - . _)": lambda _: "other-1",
    "a network id (a-z, 0-9, inner hyphens)": lambda _: "c",
    "a path": lambda _: "other-path",
    "a domain name": lambda _: "other.example",
    "a line of text": lambda _: "other text",
    "an IP address": lambda _: "127.0.0.2",
    "turn:HOST:PORT?transport=tcp": lambda _: "turn:127.0.0.1:2?transport=tcp",
    "a program or an argument, as text": lambda _: "other",
}
"""By what a leaf expects, what else it may be."""


@dataclass(frozen=True)
class Whole:
    """A whole section, where a field cannot be alone in changing."""

    section: Document


OTHERS: dict[str, Any] = {
    "Config.discovery": ["https://127.0.0.1:1"],
    "Config.token": {"file": "other.token"},
    "Config.keys": {
        "ab-1": {"file": "ab.key", "from": "a", "to": "b"},
        "ab-2": {"file": "ab2.key", "from": "a", "to": "b"},
    },
    "Config.imports": [],
    "Config.turn_servers": [],
    "DiscoveryTlsSection.ca": "other-ca.pem",
    "DiscoveryTlsSection.cert": Whole({"ca": "ca.pem", "cert": "other.pem", "key": "other.key"}),
    "DiscoveryTlsSection.key": Whole({"ca": "ca.pem", "cert": "other.pem", "key": "server.key"}),
    "LogSection.format": "logfmt",
    "LogSection.level": "debug",
    "KeySection.file": "ab2.key",
    "ImportSection.names": ["other.shop.example"],
    "ImportSection.sources": ["c"],
    "ImportSection.prefer": "remote",
    "RuleSection.sources": ["127.0.0.0/8"],
    "RuleSection.to": ["b"],
    "RuleSection.names": ["service", "address"],
    "ActivateSection.body": "other text",
    "RuleSection.ports": ["1-65535"],
    "RuleSection.action": "deny",
    "RelaySection.listen": ["127.0.0.1:0", "127.0.0.2:0"],
    "RelaySection.advertise": ["127.0.0.9"],
    "RelaySection.ports": "auto",
    "RelaySection.port_range": "2000-3000",
    "RelaySection.allow": ["127.0.0.0/9"],
    "RelaySection.rules": [],
    "RelaySection.deliver": ["127.0.0.0/16"],
    "RelaySection.direct": ["127.0.0.0/8", "10.0.0.0/8"],
    "RelaySection.sources": {"turn-2": ["127.0.0.1"]},
    "RelaySection.asks": ["c"],
    "RelaySection.proxy_from": ["10.99.0.0/16"],
    "DnsSection.listen": ["127.0.0.1:0", "127.0.0.2:0"],
    "DnsSection.upstream": ["127.0.0.1:2"],
    "DnsSection.upstream_ca": Whole(
        {"listen": "127.0.0.1:0", "upstream": "tls://127.0.0.1", "search": [], "upstream_ca": "ca.pem"}
    ),
    "DnsSection.forward": {"corp.example": "127.0.0.1:3"},
    "DnsSection.absent": ["absent.example"],
    "DnsSection.allow": ["127.0.0.0/9"],
    "DnsSection.max_udp_reply": 1000,
    "DnsSection.search": ["search.example"],
    "DnsSection.vip": "10.99.0.0/24",
    "DnsSection.cookie_secret": {"file": "cookie"},
    "GatewaySection.allow": ["127.0.0.0/8", "10.0.0.0/8"],
    "GatewaySection.rules": [],
    "GatewaySection.activate": [],
    "GatewaySection.accept": ["framed", "framed"],
    "GatewaySection.turn": {"a": {"secret": {"file": "turn.secret"}, "allow": ["127.0.0.0/8"]}, "c": {"issue": True}},
    "GatewaySection.register": "imported",
    "GatewaySection.weight": 3,
    "GatewaySection.listen": ["127.0.0.2:0"],
    "TurnAccessSection.username": Whole({"username": "u", "password": {"file": "cookie"}, "allow": ["127.0.0.0/8"]}),
    "TurnAccessSection.password": Whole({"username": "u", "password": {"file": "token"}, "allow": ["127.0.0.0/8"]}),
    "TurnAccessSection.secret": {"file": "turn2.secret"},
    "TurnAccessSection.issue": Whole({"issue": True, "allow": ["127.0.0.0/8"]}),
    "TurnAccessSection.ca": "other-ca.pem",
    "TurnAccessSection.allow": ["127.0.0.0/8", "10.0.0.0/8"],
    "ActivateSection.names": ["other.example"],
    "ActivateSection.command": Whole({"names": ["asleep.example"], "command": ["true"]}),
    "ActivateSection.url": "https://127.0.0.1:2/",
    "ActivateSection.method": "PUT",
    "ActivateSection.content_type": "text/plain",
    "ActivateSection.ca": "other-ca.pem",
    "ActivateSection.token": {"file": "other.token"},
    "TurnSection.listen": ["127.0.0.1:0"],
    "TurnSection.listen_udp": ["127.0.0.1:0"],
    "TurnSection.relay_address": ["127.0.0.2"],
    "TurnSection.advertise_relay_address": ["127.0.0.3"],
    "TurnSection.ports": "20000-20099",
    "TurnSection.secret": [{"file": "turn2.secret"}, {"file": "turn.secret"}],
    "TurnSection.users": {"u": {"file": "cookie"}},
    "TurnSection.allow_peers": ["127.0.0.0/8", "10.0.0.0/8"],
    "TurnTlsSection.listen": ["127.0.0.2:0"],
    "TurnTlsSection.cert": "other.pem",
    "TurnTlsSection.key": "other.key",
    "TurnServerSection.relay_addresses": ["127.0.0.2"],
    "DiscoveryServerSection.listen": ["127.0.0.2:0"],
    "DiscoveryServerSection.store": "sqlite:other.db",
    "DiscoveryServerSection.turn_secrets": {"a": {"file": "turn.secret"}, "c": {"file": "turn2.secret"}},
    "DiscoveryServerSection.allow_addresses": ["127.0.0.0/8", "::1/128"],
    "ServerTlsSection.cert": "other.pem",
    "ServerTlsSection.key": "other.key",
    "ServerTlsSection.client_ca": "other-ca.pem",
    "TokensSection.file": "other-tokens.yaml",
    "EtcdSection.prefix": "/other/",
    "EtcdSection.ca": "ca.pem",
    "EtcdSection.cert": Whole({"cert": "other.pem", "key": "other.key"}),
    "EtcdSection.key": Whole({"cert": "other.pem", "key": "server.key"}),
    "EtcdSection.username": Whole({"username": "u", "password": {"file": "cookie"}}),
    "EtcdSection.password": Whole({"username": "u", "password": {"file": "token"}}),
    "PublisherSection.api": "https://127.0.0.1:2",
    "PublisherSection.token": "other.token",
    "PublisherSection.ca": "other-ca.pem",
    "PublisherSection.namespaces": ["other"],
}
"""By class and field the other value, or another section around it."""


class NoOtherValue(AssertionError):
    """The test does not know another valid value of a field."""


@dataclass(frozen=True)
class Field:
    """One field of a section, at its place in a file."""

    owner: type
    field: "dataclasses.Field[Any]"
    kind: Any
    place: tuple[str | int, ...]

    @property
    def part(self) -> str:
        """The network whose file it is changed in."""
        return "b" if self.place[0] in OF_B else "a"

    @property
    def path(self) -> str:
        """As errors and events write it."""
        text = "$"
        for step in self.place:
            text = f"{text}[{step}]" if isinstance(step, int) else child(text, step)
        return text.removeprefix("$.")

    def changed(self, document: Document, now: object) -> Document:
        """Return the document with another valid value; `now` is the running configuration's."""
        made = copy.deepcopy(document)
        name = f"{self.owner.__name__}.{self.field.name}"
        marks = unwrapped(self.kind)[1]
        leaf = next((mark for mark in marks if isinstance(mark, Leaf)), None)
        if name in OTHERS:
            other = OTHERS[name]
            if isinstance(other, Whole):
                _put(made, self.place[:-1], copy.deepcopy(other.section))
                return made
        elif leaf is not None and leaf.expected in BY_TYPE:
            other = BY_TYPE[leaf.expected](now)
        else:
            raise NoOtherValue(f"{name}: add another good value of it to OTHERS, or of its type to BY_TYPE")
        _put(made, self.place, other)
        return made

    def spoilt(self, document: Document) -> Document:
        """Return the document with an invalid value."""
        made = copy.deepcopy(document)
        _put(made, self.place, BAD)
        return made


def fields(document: Document, kind: Any = Config, place: tuple[str | int, ...] = ()) -> Iterator[Field]:
    """Yield every field of every section, those of lists and mappings of sections by their first item."""
    for key, field, field_kind in fields_of(kind):
        here = (*place, key)
        inner, _ = unwrapped(field_kind)
        origin, arguments = typing.get_origin(inner), typing.get_args(inner)
        if _is_section(field_kind):
            yield from fields(document, inner, here)
            continue
        yield Field(kind, field, field_kind, here)
        item = arguments[-1 if origin is dict else 0] if arguments else None
        if origin in (dict, tuple) and _is_section(item):
            first = next(iter(_at(document, here))) if origin is dict else 0
            yield from fields(document, unwrapped(item)[0], (*here, first))


def _is_section(kind: Any) -> bool:
    inner, marks = unwrapped(kind)
    return dataclasses.is_dataclass(inner) and not any(isinstance(mark, Leaf) for mark in marks)


def all_fields(documents: dict[str, Document]) -> Iterator[Field]:
    """Yield every field of both files, each in the file where it is changed."""
    whole = documents["a"] | {name: section for name, section in documents["b"].items() if name in OF_B}
    yield from fields(whole)


def value_at(config: object, place: tuple[str | int, ...]) -> Any:
    """Return the value at a place of a configuration as shown by /config; None if there is none."""
    for step in place:
        try:
            config = config[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None
    return config


def _at(document: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        if isinstance(document, dict):
            document = document.setdefault(step, {})
        else:
            document = document[step]
    return document


def _put(document: Document, place: tuple[str | int, ...], value: object) -> None:
    _at(document, place[:-1])[place[-1]] = value


class Files:
    """A folder with both files, and all that they name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority = Authority(folder)
        authority.server("server", "a server", ["127.0.0.1"])
        authority.server("other", "another server", ["127.0.0.1"])
        (folder / "other-ca.pem").write_bytes((folder / "ca.pem").read_bytes())
        (folder / "ab.key").write_text("0a" * 32)
        (folder / "ab2.key").write_text("0b" * 32)
        (folder / "cookie").write_text("0c" * 16)
        (folder / "turn.secret").write_text("turn secret")
        (folder / "turn2.secret").write_text("another turn secret")
        tokens = []
        for network in ("a", "b"):
            for file in (f"{network}.token", f"{network}-other.token"):
                token = make_token()
                (folder / file).write_text(token)
                tokens.append(
                    format_entry(make_entry(token, name=file, network=network, kinds=list(Kind), names=["**"]))
                )
        for file in ("tokens.yaml", "other-tokens.yaml"):
            (folder / file).write_text("\n".join(tokens))
        (folder / "token").write_text((folder / "b.token").read_text())
        (folder / "other.token").write_text((folder / "a-other.token").read_text())
        discovery, turn, dns = free_port(), free_port(), free_port()
        common = {
            "discovery": [f"https://127.0.0.1:{discovery}"],
            "discovery_tls": {"ca": "ca.pem"},
            "admin": "127.0.0.1:0",
            "drain": 0,
            "keys": {"ab-1": {"file": "ab.key", "from": "a", "to": "b"}},
        }
        rule = {"from": ["127.0.0.1/32"], "ports": ["1-65534"], "action": "allow"}
        self.documents: dict[str, Document] = {
            "a": {
                "network": "a",
                **copy.deepcopy(common),
                "token": {"file": "a.token"},
                "snapshot": "a.snapshot",
                "import": [{"names": ["orders.shop.example"], "from": ["b"]}],
                "discovery_server": {
                    "listen": f"127.0.0.1:{discovery}",
                    "tls": {"cert": "server.pem", "key": "server.key", "client_ca": "ca.pem"},
                    "tokens": {"file": "tokens.yaml"},
                    "turn_secrets": {"a": {"file": "turn.secret"}},
                    "allow_addresses": ["127.0.0.0/8"],
                },
                "turn": {
                    "id": "turn-1",
                    "listen": f"127.0.0.1:{turn}",
                    "tls": {"listen": "127.0.0.1:0", "cert": "server.pem", "key": "server.key"},
                    "relay_address": "127.0.0.1",
                    "secret": {"file": "turn.secret"},
                    "allow_peers": ["127.0.0.0/8"],
                },
                "turn_servers": [{"id": "turn-2", "url": "turn:127.0.0.1:1", "relay_addresses": ["127.0.0.1"]}],
                "relay": {
                    "id": "relay-1",
                    "listen": "127.0.0.1:0",
                    "deliver": ["127.0.0.0/8"],
                    "direct": ["127.0.0.0/8"],
                    "rules": [copy.deepcopy(rule)],
                },
                "dns": {"listen": f"127.0.0.1:{dns}", "upstream": "127.0.0.1:1", "search": []},
            },
            "b": {
                "network": "b",
                **copy.deepcopy(common),
                "token": {"file": "b.token"},
                "gateway": {
                    "id": "gw-1",
                    "allow": ["127.0.0.0/8"],
                    "rules": [copy.deepcopy(rule)],
                    "turn": {"a": {"secret": {"file": "turn.secret"}, "allow": ["127.0.0.0/8"]}},
                    "activate": [
                        {
                            "names": ["asleep.example"],
                            "url": "https://127.0.0.1:1/",
                            "ca": "ca.pem",
                            "token": {"file": "token"},
                        }
                    ],
                },
                "publisher": {"api": "https://127.0.0.1:1", "token": "token", "ca": "ca.pem"},
            },
        }

    def text(self, document: Document) -> str:
        """Return a file."""
        return yaml.safe_dump(document, sort_keys=False)
