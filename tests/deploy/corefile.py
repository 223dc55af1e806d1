"""A reader of CoreDNS's configuration, as strict as one can be without CoreDNS itself: its grammar, its plugins' properties.

What a plugin takes, and how often, is what its parser takes in the sources of CoreDNS 1.8 and later; only the plugins that a
cluster's files have are known. The one error is BadCorefile.
"""

import re
import shlex
from dataclasses import dataclass, field
from ipaddress import ip_address

DURATION = r"(\d+(\.\d+)?(ns|us|ms|s|m|h))+"
NUMBER = r"\d+"
POSITIVE = r"[1-9]\d*"
ZONE = r"(\.|([A-Za-z0-9_*-]+\.)*[A-Za-z0-9_*-]+\.?)"
ADDRESS = r"(?P<ip>[0-9a-f.:]+)"
ENDPOINT = rf"((dns|tls)://)?{ADDRESS}(:\d+)?|/\S+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """What one plugin takes: a pattern for its arguments, joined by spaces, and one for each property's."""

    arguments: str = ""
    properties: dict[str, str] = field(default_factory=dict)
    once: bool = True


def _list(one: str, *, least: int = 1) -> str:
    return rf"({one})( ({one}))*" if least else rf"(({one})( ({one}))*)?"


_CAPACITY = rf"{POSITIVE}( {POSITIVE}( {NUMBER})?)?"
PLUGINS = {
    "bind": Plugin(arguments=_list(ADDRESS.replace("?P<ip>", "")), once=False),
    "cache": Plugin(
        arguments=rf"({POSITIVE}( {_list(ZONE)})?|{_list(ZONE)})?",
        properties={
            "success": _CAPACITY,
            "denial": _CAPACITY,
            "prefetch": rf"{POSITIVE}( {DURATION}( [1-9]0%)?)?",
            "serve_stale": rf"({DURATION}( (verify|immediate))?)?",
            "servfail": DURATION,
            "disable": rf"(success|denial)( {_list(ZONE)})?",
            "keepttl": "",
        },
    ),
    "errors": Plugin(properties={"consolidate": rf"{DURATION} \S.*", "stacktrace": ""}),
    "forward": Plugin(
        arguments=rf"{ZONE} {_list(ENDPOINT.replace('?P<ip>', ''))}",
        properties={
            "except": _list(ZONE),
            "max_fails": NUMBER,
            "health_check": rf"{DURATION}( no_rec)?( domain {ZONE})?",
            "force_tcp": "",
            "prefer_udp": "",
            "tls": r"(\S+( \S+( \S+)?)?)?",
            "tls_servername": ZONE,
            "expire": DURATION,
            "policy": "random|round_robin|sequential",
            "max_concurrent": NUMBER,
        },
        once=False,
    ),
    "health": Plugin(arguments=r"(\S*:\d+)?", properties={"lameduck": DURATION}),
    "kubernetes": Plugin(
        arguments=_list(ZONE, least=0),
        properties={
            "pods": "disabled|insecure|verified",
            "fallthrough": _list(ZONE, least=0),
            "ttl": r"[0-9]{1,3}|[12][0-9]{3}|3[0-5][0-9]{2}|3600",
            "namespaces": _list(r"\S+"),
            "endpoint_pod_names": "",
            "noendpoints": "",
        },
    ),
    "loadbalance": Plugin(arguments="(round_robin)?"),
    "loop": Plugin(),
    "prometheus": Plugin(arguments=r"(\S*:\d+)?"),
    "ready": Plugin(arguments=r"(\S*:\d+)?"),
    "reload": Plugin(arguments=rf"({DURATION}( {DURATION})?)?"),
}


class BadCorefile(ValueError):
    """CoreDNS would not take it; the text says the line and why."""


def check(text: str) -> list[str]:
    """Read a Corefile; return the zones of its server blocks. Raises BadCorefile."""
    zones: list[str] = []
    plugin: str | None = None
    seen: list[str] = []
    depth = 0
    for number, line in enumerate(text.splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        opens = words[-1] == "{"
        if opens:
            words.pop()
        bad = BadCorefile(f"line {number}: {line.strip()!r}")
        if any("{" in word or "}" in word for word in words if word != "}") or (words and words[0] == "}" != words[-1]):
            raise bad
        match depth, words:
            case _, ["}"] if depth and not opens:
                depth -= 1
            case 0, [_, *_] if opens:
                for word in words:
                    _check(word, rf"((dns|tls|grpc)://)?{ZONE}(:\d+)?", bad)
                    if word in zones:
                        raise bad  # CoreDNS: cannot serve … it is already defined
                    zones.append(word)
                depth, seen = 1, []
            case 1, [plugin, *arguments]:
                known = PLUGINS.get(plugin)
                if known is None or (known.once and plugin in seen) or (opens and not known.properties):
                    raise bad
                _check(" ".join(arguments), known.arguments, bad)
                seen.append(plugin)
                depth += opens
            case 2, [name, *arguments] if plugin is not None and not opens and name in PLUGINS[plugin].properties:
                _check(" ".join(arguments), PLUGINS[plugin].properties[name], bad)
            case _:
                raise bad
    if depth:
        raise BadCorefile("a block is not closed")
    return zones


def _check(text: str, pattern: str, bad: BadCorefile) -> None:
    if re.fullmatch(pattern, text) is None:
        raise bad
    for word in text.split():
        host = word.rpartition("://")[2]
        if re.fullmatch(r"[0-9]+(\.[0-9]+){3}(:\d+)?", host):
            try:
                ip_address(host.partition(":")[0])
            except ValueError as error:
                raise bad from error
