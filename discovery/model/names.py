"""Names of targets: encodes and decodes the mangled and compact names under the mesh domain.

Six forms (D is the mesh domain):

    _8443._10-1-0-5._b.D        address name: 10.1.0.5:8443 in network b
    _8443._fd00--5._b.D         the same for IPv6: RFC 5952 text with '-' for ':'
    _8443.orders.shop._b.D      service `orders.shop` of network b, port 8443
    p8443-10-1-0-5.b.D          compact address; IPv6 is p8443-x and 32 hexadecimal digits
    p8443-orders.shop.b.D       compact service: at least three labels before D
    orders.shop.example         any name outside D: a candidate service name

The compact forms exist because some clients do not support underscores: OpenSSL matches no wildcard against such a label, and
Java sends no SNI for it at all. A target has exactly one name in each form, so that two parties that compare names never
disagree: a name that is not canonical is refused with a reason.

Sans-IO: text in, values out. The only error is BadName.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address

MAX_NAME = 253  # RFC 1035 section 2.3.4: 255 octets on the wire, less the first length octet and the root
MAX_LABEL = 63  # RFC 1035 section 2.3.4
MAX_PORT = 65535


class NameReason(StrEnum):
    """Why a name is invalid. Only INCOMPLETE means that there may be valid names at or below it (DNS: NODATA)."""

    EMPTY = "empty"
    TOO_LONG = "too_long"
    LABEL_TOO_LONG = "label_too_long"
    BAD_CHARACTER = "bad_character"
    BAD_PORT = "bad_port"
    BAD_ADDRESS = "bad_address"
    BAD_LABEL = "bad_label"
    NOT_A_TARGET = "not_a_target"
    INCOMPLETE = "incomplete"


class BadName(ValueError):
    """An invalid name, or a target that has no name.

    `detail` is a sentence for an operator. It contains only characters that were checked, never raw bytes from a peer.
    """

    def __init__(self, reason: NameReason, detail: str) -> None:
        """`reason` is for metrics, `detail` is a sentence for people."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Form(StrEnum):
    """The two forms of a target's name under the mesh domain."""

    MANGLED = "mangled"
    COMPACT = "compact"


@dataclass(frozen=True, slots=True)
class AddressTarget:
    """An address and port, as seen in network `network`."""

    network: str
    address: IPv4Address | IPv6Address
    port: int


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """A port of the service of `network` whose name is `service` or starts with `service` and a dot."""

    network: str
    service: str
    port: int


@dataclass(frozen=True, slots=True)
class PlainName:
    """A name outside the mesh domain, normalised: a candidate service name."""

    name: str


Target = AddressTarget | ServiceTarget | PlainName

_ALLOWED = re.compile(r"[a-z0-9_.-]*")
_LDH = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SERVICE_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_DECIMAL_QUAD = re.compile(r"(?:[0-9]+-){3}[0-9]+")
_COMPACT = re.compile(r"p([0-9]+)-(.+)")
# A label that is or looks like a compact address. No service name may end in such a label, so that a mistyped address can be
# reported as an error without hiding a service below it.
_COMPACT_ADDRESS_LIKE = re.compile(r"p[0-9]+-(?:[0-9][0-9-]*|x[0-9a-f]*)")


def is_ldh_label(text: str) -> bool:
    """Return whether this is a label of 1 to 63 lower-case letters, digits and inner hyphens."""
    return _LDH.fullmatch(text) is not None


def is_service_label(text: str) -> bool:
    """Return whether this is a label of a service name: as `is_ldh_label`, but inner underscores are allowed, too.

    Windows hosts and containers have such names. A label that begins with an underscore is never a service's, since address names
    have those.
    """
    return _SERVICE_LABEL.fullmatch(text) is not None


def is_service_name(text: str) -> bool:
    """Return whether a service may have this name: at least two labels, at most 253 characters, the last label no number."""
    if len(text) > MAX_NAME:
        return False
    labels = text.split(".")
    return len(labels) > 1 and all(map(is_service_label, labels)) and not labels[-1].isdigit()


def is_under(name: str, domain: str) -> bool:
    """Return whether a normalised name is the normalised domain or is under it."""
    return name == domain or name.endswith("." + domain)


def normalise(name: str | bytes) -> str:
    """Lower-case a name, strip one trailing dot and check its characters and lengths.

    Letters, digits, hyphens and underscores are accepted anywhere in a label: stricter rules are applied where the meaning of
    the label is known. Raises BadName.
    """
    if len(name) > MAX_NAME + 1:
        raise BadName(NameReason.TOO_LONG, f"the name has {len(name)} characters, the limit is {MAX_NAME}")
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    if text.isascii():
        text = text.lower().removesuffix(".")
    if not text:
        raise BadName(NameReason.EMPTY, "the name is empty")
    good = _ALLOWED.match(text)
    if good is None or good.end() != len(text):
        position = good.end() if good else 0
        raise BadName(
            NameReason.BAD_CHARACTER,
            f"character {position + 1} of the name is U+{ord(text[position]):04X}; "
            "names have letters, digits, '-', '_' and '.'",
        )
    if len(text) > MAX_NAME:
        raise BadName(NameReason.TOO_LONG, f"the name has {len(text)} characters, the limit is {MAX_NAME}")
    for label in text.split("."):
        if not label:
            raise BadName(NameReason.BAD_LABEL, f"{text!r} has an empty label")
        if len(label) > MAX_LABEL:
            raise BadName(
                NameReason.LABEL_TOO_LONG,
                f"label {label[:20]!r}… has {len(label)} characters, the limit is {MAX_LABEL}",
            )
    return text


@lru_cache(maxsize=64)
def normalise_domain(domain: str) -> str:
    """Normalise and check a mesh domain: LDH labels. Raises BadName."""
    text = normalise(domain)
    for label in text.split("."):
        _check_ldh(label, "the mesh domain")
    return text


def decode(name: str | bytes, domain: str) -> AddressTarget | ServiceTarget | PlainName:
    """Decode a name of any form. Raises BadName for names that are not exactly in one of the forms."""
    domain = normalise_domain(domain)
    text = normalise(name)
    if not is_under(text, domain):
        return _check_plain(text)
    if text == domain:
        raise BadName(NameReason.INCOMPLETE, f"{text!r} is the mesh domain itself and names no target")
    labels = text[: -len(domain) - 1].split(".")
    network = labels.pop()
    if network.startswith("_"):
        return _decode_mangled(labels, network[1:], text)
    return _decode_compact(labels, network, text)


def encode(target: AddressTarget | ServiceTarget | PlainName, domain: str, form: Form = Form.COMPACT) -> str:
    """Return the name of a target in this form. Raises BadName if it has none.

    If the first label of a service name has 58 characters or more (with a port of four digits), only the mangled form fits.
    """
    domain = normalise_domain(domain)
    if isinstance(target, PlainName):
        if normalise(target.name) != target.name or is_under(target.name, domain):
            raise BadName(NameReason.NOT_A_TARGET, "a plain name is lower-case and lies outside the mesh domain")
        return _check_plain(target.name).name
    _check_ldh(target.network, "the network")
    if not 1 <= target.port <= MAX_PORT:
        raise BadName(NameReason.BAD_PORT, f"port {target.port} is outside 1-{MAX_PORT}")
    if isinstance(target, AddressTarget):
        _check_address(target.address)
        if form is Form.MANGLED:
            head = f"_{target.port}._{_address_text(target.address)}"
        elif isinstance(target.address, IPv4Address):
            head = f"p{target.port}-{_address_text(target.address)}"
        else:
            head = f"p{target.port}-x{int(target.address):032x}"
    else:
        _check_service(target.service.split("."))
        head = f"_{target.port}.{target.service}" if form is Form.MANGLED else f"p{target.port}-{target.service}"
    network = f"_{target.network}" if form is Form.MANGLED else target.network
    return normalise(f"{head}.{network}.{domain}")


def names_of(target: AddressTarget | ServiceTarget, domain: str) -> Iterator[str]:
    """Yield the names of a target under the mesh domain, one for each form that it has."""
    for form in Form:
        with suppress(BadName):  # a long first label fits only one form, and a long service name none
            yield encode(target, domain, form)


def beginnings(target: ServiceTarget) -> Iterator[ServiceTarget]:
    """Yield the service with each prefix of at least two labels of its name, the full name last."""
    labels = target.service.split(".")
    for count in range(2, len(labels) + 1):
        yield ServiceTarget(target.network, ".".join(labels[:count]), target.port)


def possible_names(target: AddressTarget | ServiceTarget, domain: str) -> Iterator[str]:
    """Yield all names that may resolve to a target. Those of services may also resolve to others, or be too long for DNS."""
    if isinstance(target, AddressTarget):
        yield from names_of(target, domain)
        return
    yield target.service
    for short in beginnings(target):  # not by `encode`: this runs for every service that shares an endpoint
        yield f"p{short.port}-{short.service}.{short.network}.{domain}"
        yield f"_{short.port}.{short.service}._{short.network}.{domain}"


def _decode_mangled(labels: list[str], network: str, text: str) -> AddressTarget | ServiceTarget:
    _check_ldh(network, "the network, after '_',")
    if not labels:
        raise BadName(NameReason.INCOMPLETE, f"{text!r} names network {network!r} and no target in it")
    if labels[-1].startswith("_"):
        return _decode_mangled_address(labels, network, text)
    if not labels[0].startswith("_"):
        _check_service(labels, least=1)
        raise BadName(NameReason.INCOMPLETE, f"{text!r} has no port: expected _PORT.SERVICE._{network}")
    port = _port(labels[0][1:])
    if len(labels) == 2:
        raise BadName(NameReason.NOT_A_TARGET, f"service name {labels[1]!r} has one label, expected at least two")
    _check_service(labels[1:])
    return ServiceTarget(network, ".".join(labels[1:]), port)


def _decode_mangled_address(labels: list[str], network: str, text: str) -> AddressTarget:
    if len(labels) > 2:
        raise BadName(NameReason.NOT_A_TARGET, f"{text!r} has more labels than _PORT._ADDRESS._NETWORK")
    if len(labels) == 1 and labels[0][1:].isdigit():
        raise BadName(NameReason.NOT_A_TARGET, f"{text!r} has a port but neither address nor service")
    address = _address(labels[-1][1:])
    if len(labels) == 1:
        raise BadName(NameReason.INCOMPLETE, f"{text!r} has no port: expected _PORT.{labels[0]}._{network}")
    if not labels[0].startswith("_"):
        raise BadName(NameReason.BAD_PORT, f"{labels[0]!r} is not '_' and a port")
    return AddressTarget(network, address, _port(labels[0][1:]))


def _decode_compact(labels: list[str], network: str, text: str) -> AddressTarget | ServiceTarget:
    _check_ldh(network, "the network")
    if not labels:
        raise BadName(NameReason.INCOMPLETE, f"{text!r} names network {network!r} and no target in it")
    for label in labels:
        _check_service_label(label)
    compact = _COMPACT.fullmatch(labels[0])
    if len(labels) == 1:
        if compact is None or not _COMPACT_ADDRESS_LIKE.fullmatch(labels[0]):
            # Not an error in DNS: p8443-orders.shop.b.D is below shop.b.D, and p8443-orders.p1-x.b.D is below p1-x.b.D.
            raise BadName(NameReason.INCOMPLETE, f"{text!r} is neither pPORT-ADDRESS nor a service of two labels")
        port = _port(compact[1])
        return AddressTarget(network, _compact_address(compact[2]), port)
    _check_service(labels, least=1)
    if compact is None:
        raise BadName(NameReason.INCOMPLETE, f"{text!r} has no port: expected pPORT-SERVICE.{network}")
    try:
        port = _port(compact[1])
    except BadName as error:
        # A namespace may be called p0-team. Names below this one can be valid, so DNS must not answer NXDOMAIN.
        raise BadName(NameReason.INCOMPLETE, f"{text!r} names no target: {error.detail}") from None
    service = [compact[2], *labels[1:]]
    try:
        _check_service(service)
    except BadName as error:
        raise BadName(NameReason.INCOMPLETE, f"{text!r} names no target: {error.detail}") from None
    return ServiceTarget(network, ".".join(service), port)


def _check_plain(text: str) -> PlainName:
    if "." not in text:
        raise BadName(NameReason.NOT_A_TARGET, f"{text!r} has one label, service names have two or more")
    if text.rpartition(".")[2].isdigit():
        raise BadName(NameReason.NOT_A_TARGET, f"{text!r} ends in a number as addresses do, names do not")
    return PlainName(text)


def _check_ldh(label: str, what: str = "") -> None:
    if not is_ldh_label(label):
        subject = f"{what} label {label[:MAX_LABEL]!r}" if what else f"label {label[:MAX_LABEL]!r}"
        if len(label) > MAX_LABEL:
            raise BadName(NameReason.LABEL_TOO_LONG, f"{subject} has {len(label)} characters, the limit is {MAX_LABEL}")
        allowed = "hyphens" if what else "hyphens or underscores"
        raise BadName(NameReason.BAD_LABEL, f"{subject} is not lower-case letters, digits and {allowed} between them")


def _check_service_label(label: str) -> None:
    if not is_service_label(label):
        _check_ldh(label)  # says what is wrong


def _check_service(labels: list[str], least: int = 2) -> None:
    for label in labels:
        _check_service_label(label)
    if len(labels) < least:
        raise BadName(NameReason.NOT_A_TARGET, f"service name {labels[0]!r} has one label, expected at least two")
    if _COMPACT_ADDRESS_LIKE.fullmatch(labels[-1]):
        raise BadName(NameReason.BAD_LABEL, f"{labels[-1]!r} ends a service name but reads as a compact address")


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > MAX_PORT:
        raise BadName(NameReason.BAD_PORT, f"{text!r} is not a port, 1-{MAX_PORT} without leading zeros")
    return int(text)


def _address_text(address: IPv4Address | IPv6Address) -> str:
    return str(address).translate(_TO_HYPHENS)


_TO_HYPHENS = {ord("."): "-", ord(":"): "-"}


def _check_address(address: IPv4Address | IPv6Address) -> None:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            raise BadName(NameReason.BAD_ADDRESS, f"{address} is IPv4-mapped: write {address.ipv4_mapped}")
        if address.scope_id is not None:
            raise BadName(NameReason.BAD_ADDRESS, "an IPv6 address with a zone means nothing in another network")


def _address(text: str) -> IPv4Address | IPv6Address:
    """Parse the hyphenated text of an address. Four groups are never IPv6, which has eight groups or an empty one."""
    address: IPv4Address | IPv6Address
    try:
        address = IPv4Address(text.replace("-", ".")) if _DECIMAL_QUAD.fullmatch(text) else _ipv6(text)
    except AddressValueError:
        raise BadName(
            NameReason.BAD_ADDRESS,
            f"{text!r} is not an address: expected four decimals joined by '-', or IPv6 with '-' for ':'",
        ) from None
    _check_address(address)
    if _address_text(address) != text:
        raise BadName(
            NameReason.BAD_ADDRESS, f"{text!r} is not the canonical spelling: write {_address_text(address)!r}"
        )
    return address


def _ipv6(text: str) -> IPv6Address:
    return IPv6Address(text.replace("-", ":"))


def _compact_address(text: str) -> IPv4Address | IPv6Address:
    if text.startswith("x"):
        if len(text) != 33:
            raise BadName(NameReason.BAD_ADDRESS, f"{text!r} is not 'x' and 32 hexadecimal digits")
        address = IPv6Address(int(text[1:], 16))
        _check_address(address)
        return address
    if not _DECIMAL_QUAD.fullmatch(text):
        raise BadName(
            NameReason.BAD_ADDRESS, f"{text!r} is not an address: expected 10-1-0-5, or 'x' and 32 hexadecimal digits"
        )
    return _address(text)
