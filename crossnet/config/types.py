"""Types of single values in a configuration file: durations, sizes, addresses, names, files, secrets.

Each is an `Annotated` type for a section's field, with which schema.py parses and prints values.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from yarl import URL

from crossnet.config import file_values
from crossnet.config.file_values import Certificates, Secret
from crossnet.config.schema import HIDDEN, Leaf, Mismatch
from discovery.files.yaml_file import Plain
from discovery.model.addresses import (
    Address,
    BadAddress,
    Network,
    TargetList,
    format_endpoint,
    parse_address,
    parse_cidrs,
    parse_endpoint,
    parse_turn_url,
)
from discovery.model.names import MAX_PORT, BadName, is_ldh_label, normalise_domain
from discovery.model.spec import MAX_WEIGHT, is_record_id
from discovery.model.validation import shown
from discovery.store.etcdapi import parse_endpoints
from sniproxy.access.name_pattern import NamePattern
from sniproxy.access.rules import BadRule, NameKind, Rule
from sniproxy.engine.buffer_share import MIN_BUFFER_BYTES

MAX_ARGUMENT = 4096
MAX_DURATION_S = 7 * 24 * 3600.0
OFF = "off"

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_UNITS_BYTES = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


@dataclasses.dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on; port 0: any free port."""

    address: Address
    port: int

    def __str__(self) -> str:
        return format_endpoint(self.address, self.port)


def parse_duration(value: Plain) -> float:
    """Parse a duration and return seconds. Raises Mismatch."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)", value) if isinstance(value, str) else None
    if match is None:
        raise Mismatch
    seconds = float(match[1]) * _UNITS_S[match[2]]
    if seconds > MAX_DURATION_S:
        raise Mismatch("a duration of at most 7d")
    return seconds


def format_duration(seconds: float) -> str:
    """Return the shortest text that `parse_duration` reads as the same duration, to the millisecond."""
    milliseconds = round(seconds * 1000)
    for unit, length in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds and milliseconds % length == 0:
            return f"{milliseconds // length}{unit}"
    return f"{milliseconds}ms"


def parse_size(value: Plain) -> int:
    """Parse a size and return bytes. Raises Mismatch."""
    match = None if isinstance(value, bool) else re.fullmatch(r"([0-9]{1,15})(|B|KiB|MiB|GiB)", str(value))
    if match is None:
        raise Mismatch
    return int(match[1]) * _UNITS_BYTES[match[2]]


def format_size(size: int) -> str:
    """Return the shortest text that `parse_size` reads as the same size."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _UNITS_BYTES[unit] == 0:
            return f"{size // _UNITS_BYTES[unit]}{unit}"
    return str(size)


def _text(parse: Callable[[str], object]) -> Callable[[Plain, Path], object]:
    """Wrap a parser of discovery, whose messages begin with "expected" and end with "got"."""

    def parsed(value: Plain, folder: Path) -> object:
        del folder
        if not isinstance(value, str):
            raise Mismatch
        try:
            return parse(value)
        except BadAddress as error:
            raise Mismatch(re.sub(r"^expected |, got .*$", "", str(error), flags=re.DOTALL)) from error
        except BadName as error:
            raise Mismatch(f"a name ({error.detail})") from error

    return parsed


def _matching(pattern: str) -> Callable[[Plain, Path], object]:
    def parsed(value: Plain, folder: Path) -> object:
        del folder
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise Mismatch
        return value

    return parsed


def _integer(low: int, high: int) -> Callable[[Plain, Path], object]:
    def parsed(value: Plain, folder: Path) -> object:
        del folder
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Mismatch
        return value

    return parsed


def _more_than_nothing(parse: Callable[[Plain], float]) -> Callable[[Plain, Path], object]:
    def parsed(value: Plain, folder: Path) -> object:
        del folder
        number = parse(value)
        if number <= 0:
            raise Mismatch("more than nothing")
        return number

    return parsed


def _duration_or_zero(value: Plain, folder: Path) -> object:
    del folder
    return 0.0 if value == 0 and not isinstance(value, bool) else parse_duration(value)


def _duration_or_off(value: Plain, folder: Path) -> object:
    return math.inf if value == OFF else _more_than_nothing(parse_duration)(value, folder)


def _format_duration_or_off(seconds: float) -> str:
    return OFF if math.isinf(seconds) else format_duration(seconds)


def _whole_seconds(value: Plain, folder: Path) -> object:
    del folder
    seconds = parse_duration(value)
    if seconds < 1 or seconds % 1:
        raise Mismatch("whole seconds, 1s or more")
    return int(seconds)


def _percent(value: Plain, folder: Path) -> object:
    del folder
    match = re.fullmatch(r"([1-9][0-9]?|100)%", value) if isinstance(value, str) else None
    if match is None:
        raise Mismatch
    return int(match[1])


def _boolean(value: Plain, folder: Path) -> object:
    del folder
    if not isinstance(value, bool):
        raise Mismatch
    return value


def _ldh(text: str) -> str:
    if not is_ldh_label(text):
        raise Mismatch
    return text


def _record_id(text: str) -> str:
    if not is_record_id(text):
        raise Mismatch
    return text


def _listen(text: str) -> Listen:
    return Listen(*parse_endpoint(text, zero_port=True))


def _endpoint(text: str) -> Listen:
    return Listen(*parse_endpoint(text))


def _turn_url(text: str) -> str:
    parse_turn_url(text)
    return text


def _target(text: str) -> str:
    TargetList.parse([text])
    return text


def _cidr(text: str) -> Network:
    return parse_cidrs([text])[0]


def _port_range(value: Plain, folder: Path) -> object:
    del folder
    match = re.fullmatch(r"([1-9][0-9]{0,4})-([1-9][0-9]{0,4})", value) if isinstance(value, str) else None
    if match is None or not int(match[1]) <= int(match[2]) <= MAX_PORT:
        raise Mismatch
    return int(match[1]), int(match[2])


def _discovery_source(value: Plain, folder: Path) -> object:
    """Return a discovery server's URL as text, or the path of a static mesh file."""
    if not isinstance(value, str):
        raise Mismatch
    if value.endswith(".yaml"):
        return file_values.existing_file(value, folder)
    if not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:[1-9][0-9]{0,4})?/?", value, re.ASCII):
        raise Mismatch
    return value.rstrip("/")


def _rule_item(key: str) -> Callable[[Plain, Path], object]:
    """Return a parser for one item of a rule's list, which validates it as the rule does."""

    def parsed(value: Plain, folder: Path) -> object:
        del folder
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise Mismatch
        try:
            Rule.parse(action="allow", **{key: [str(value)]})
        except BadRule as error:
            raise Mismatch(error.expected) from error
        return str(value)

    return parsed


def _argument(value: Plain, folder: Path) -> object:
    del folder
    if not isinstance(value, str) or not value or "\0" in value or len(value) > MAX_ARGUMENT:
        raise Mismatch
    return value


def _url(value: Plain, folder: Path) -> object:
    del folder
    if not isinstance(value, str) or not re.fullmatch(r"https?://[\x21-\x7e]{1,2000}", value):
        raise Mismatch(got=_shown_url(value))
    try:
        url = URL(value)
    except ValueError as error:
        raise Mismatch(got=_shown_url(value)) from error
    if not url.host or url.user is not None or url.password is not None:
        raise Mismatch(got=_shown_url(value))
    return value


def _without_query(value: object) -> str:
    """Print a URL without its query, which may contain the key of a webhook."""
    address, mark, _ = re.split(r"([?#])", f"{value}?", maxsplit=1)
    return f"{address}{mark}{HIDDEN}" if len(address) < len(str(value)) else address


def _shown_url(value: Plain) -> str:
    """Describe an invalid URL, without parts that may be secret."""
    return "something else" if isinstance(value, str) and "@" in value else shown(_without_query(value))


def _hidden(value: object) -> str:
    del value
    return HIDDEN


def _name_pattern(text: str) -> NamePattern:
    try:
        return NamePattern.parse(text)
    except ValueError as error:
        raise Mismatch(f"the name of a service or a pattern of such ({error})") from error


def _store(value: Plain, folder: Path) -> object:
    if value == "memory":
        return value
    if isinstance(value, str) and value.startswith("etcd:"):
        try:
            return "etcd:" + ",".join(parse_endpoints(value.removeprefix("etcd:")))
        except ValueError:
            raise Mismatch from None
    if not isinstance(value, str) or not value.startswith("sqlite:") or value == "sqlite:":
        raise Mismatch
    return f"sqlite:{file_values.relative_path(value.removeprefix('sqlite:'), folder)}"


def _buffer_size(value: Plain, folder: Path) -> int:
    del folder
    size = parse_size(value)
    if size < MIN_BUFFER_BYTES:
        raise Mismatch
    return size


def _word(*words: str) -> Leaf:
    def parsed(value: Plain, folder: Path) -> object:
        del folder
        if value not in words:
            raise Mismatch
        return value

    return Leaf(" or ".join(words), parsed)


def _same(value: Plain) -> Plain:
    return value


Duration: TypeAlias = Annotated[
    float, Leaf("a duration such as 5s, 250ms or 2m", _more_than_nothing(parse_duration), format_duration)
]
DurationOrZero: TypeAlias = Annotated[float, Leaf("a duration such as 5s, or 0", _duration_or_zero, format_duration)]
DurationOrOff: TypeAlias = Annotated[
    float, Leaf("a duration such as 5s, or off", _duration_or_off, _format_duration_or_off)
]
WholeSeconds: TypeAlias = Annotated[int, Leaf("a duration such as 5s", _whole_seconds, format_duration)]
Size: TypeAlias = Annotated[int, Leaf("a size such as 64KiB", _more_than_nothing(parse_size), format_size)]
BufferSize: TypeAlias = Annotated[
    int, Leaf(f"a size such as 1MiB, at least {format_size(MIN_BUFFER_BYTES)}", _buffer_size, format_size)
]
Percent: TypeAlias = Annotated[
    int, Leaf("a share such as 50%, from 1% to 100%", _percent, lambda percent: f"{percent}%")
]
Boolean: TypeAlias = Annotated[bool, Leaf("true or false", _boolean, _same)]
Port: TypeAlias = Annotated[int, Leaf(f"a port 1-{MAX_PORT}", _integer(1, MAX_PORT), _same)]
Count: TypeAlias = Annotated[int, Leaf("a whole number 0-1000000", _integer(0, 1_000_000), _same)]
PortRange: TypeAlias = Annotated[
    tuple[int, int], Leaf("a range of ports such as 49152-65535", _port_range, lambda ports: f"{ports[0]}-{ports[1]}")
]
NetworkId: TypeAlias = Annotated[str, Leaf("a network id (a-z, 0-9, inner hyphens)", _text(_ldh))]
RecordId: TypeAlias = Annotated[str, Leaf("an id (a-z, 0-9, inner - . _)", _text(_record_id))]
KeyId: TypeAlias = Annotated[
    str, Leaf("a key id (letters, digits, . _ -)", _matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"))
]
Domain: TypeAlias = Annotated[str, Leaf("a domain name", _text(normalise_domain))]
IpAddress: TypeAlias = Annotated[Address, Leaf("an IP address", _text(parse_address))]
ListenAddress: TypeAlias = Annotated[Listen, Leaf("ip:port to listen on", _text(_listen))]
Endpoint: TypeAlias = Annotated[Listen, Leaf("ip:port", _text(_endpoint))]
Target: TypeAlias = Annotated[str, Leaf("CIDR[:PORTS]", _text(_target))]
Cidr: TypeAlias = Annotated[Network, Leaf("a CIDR", _text(_cidr))]
TurnServerUrl: TypeAlias = Annotated[str, Leaf("turn:HOST:PORT?transport=tcp", _text(_turn_url))]
ImportName: TypeAlias = Annotated[str, Leaf("a service name; a label may be *", _matching(r"[a-z0-9*._-]{1,253}"))]
Prefer: TypeAlias = Annotated[Literal["local", "remote"], _word("local", "remote")]
Ports: TypeAlias = Annotated[Literal["listen", "auto"], _word("listen", "auto")]
LogFormat: TypeAlias = Annotated[Literal["json", "logfmt"], _word("json", "logfmt")]
LogLevel: TypeAlias = Annotated[
    Literal["debug", "info", "warning", "error"], _word("debug", "info", "warning", "error")
]
Register: TypeAlias = Annotated[Literal["all", "imported"], _word("all", "imported")]
Weight: TypeAlias = Annotated[int, Leaf(f"a whole number 1-{MAX_WEIGHT}", _integer(1, MAX_WEIGHT), _same)]
Replicas: TypeAlias = Annotated[int, Leaf("a whole number 1-16", _integer(1, 16), _same)]
Accepted: TypeAlias = Annotated[Literal["framed"], _word("framed")]
Store: TypeAlias = Annotated[str, Leaf("memory, sqlite:PATH or etcd:URL,URL", _store)]
Text: TypeAlias = Annotated[str, Leaf("a line of text", _matching(r"[\x20-\x7e]{1,128}"))]
KubernetesUrl: TypeAlias = Annotated[str, Leaf("https://HOST:PORT", _matching(r"https?://[A-Za-z0-9.:\[\]-]{1,255}/?"))]
KeyPrefix: TypeAlias = Annotated[str, Leaf("a key prefix such as /crossnet/", _matching(r"/[\x21-\x7e]{0,100}/"))]
NewFile: TypeAlias = Annotated[Path, Leaf("a path", file_values.relative_path)]
CertificatesFile: TypeAlias = Annotated[Certificates, Leaf("a readable file", file_values.certificates_file)]
ExistingFile: TypeAlias = Annotated[Path, Leaf("a readable file", file_values.existing_file)]
DiscoverySource: TypeAlias = Annotated[
    str | Path, Leaf("https://HOST:PORT, or a path ending in .yaml", _discovery_source)
]
SecretFile: TypeAlias = Annotated[Secret, Leaf("{file: PATH}", file_values.secret_file)]
RuleSource: TypeAlias = Annotated[str, Leaf("a CIDR of clients or a network id", _rule_item("sources"))]
RuleDestination: TypeAlias = Annotated[str, Leaf("a network id, a name or a target", _rule_item("to"))]
RuleName: TypeAlias = Annotated[Literal["service", "address"], _word(*NameKind)]
RulePort: TypeAlias = Annotated[str, Leaf("a port or a range such as 8000-8099", _rule_item("ports"))]
ServicePattern: TypeAlias = Annotated[
    NamePattern,
    Leaf(
        "the name of a service or a pattern of such",
        _text(_name_pattern),
        lambda pattern: ".".join(pattern.labels),
    ),
]
Argument: TypeAlias = Annotated[str, Leaf("a program or an argument, as text", _argument)]
Url: TypeAlias = Annotated[str, Leaf("https://HOST[:PORT]/PATH", _url, _without_query)]
HiddenText: TypeAlias = Annotated[str, Leaf("text", _argument, _hidden)]
Method: TypeAlias = Annotated[Literal["GET", "POST", "PUT", "PATCH"], _word("GET", "POST", "PUT", "PATCH")]
ContentType: TypeAlias = Annotated[str, Leaf("a media type", _matching(r"[a-z0-9.+-]{1,80}/[a-z0-9.+-]{1,80}"))]
RuleAction: TypeAlias = Annotated[Literal["allow", "deny"], _word("allow", "deny")]
KeyFile: TypeAlias = Annotated[Secret, Leaf("a file with 64 hexadecimal digits", file_values.key_file)]
