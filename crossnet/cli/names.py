"""`crossnet name encode|decode`: names of the mesh domain, in both of their forms."""

import json
import sys
from collections.abc import Sequence

from discovery.model.addresses import BadAddress, format_endpoint, parse_endpoint, parse_port
from discovery.model.names import (
    AddressTarget,
    BadName,
    Form,
    NameReason,
    PlainName,
    ServiceTarget,
    decode,
    encode,
    normalise,
)


def encode_command(target: str, network: str, domain: str) -> int:
    """Print the compact and the mangled name of `IP:PORT` or `SERVICE:PORT` in a network; return the exit code."""
    try:
        made = forms(parse_target(target, network), domain)
    except (BadName, BadAddress) as error:
        print(f"crossnet name: {error}", file=sys.stderr)
        return 1
    for name in made.values():
        print(name)
    return 0


def decode_command(names: Sequence[str], domain: str, as_json: bool) -> int:
    """Print what each name means; return 1 if any of them is not valid."""
    failed = 0
    for name in names:
        try:
            meaning = describe(name, domain)
        except BadName as error:
            failed = 1
            meaning = {"name": name, "reason": str(error.reason), "detail": error.detail}
            if not as_json:
                print(f"crossnet name: {error}", file=sys.stderr)
                continue
        if as_json:
            print(json.dumps(meaning))
        else:
            print("\n".join(f"{key:8} {value}" for key, value in meaning.items()))
    return failed


def parse_target(text: str, network: str) -> AddressTarget | ServiceTarget:
    """Parse `IP:PORT`, `[IPV6]:PORT` or `SERVICE:PORT`. Raises BadName, BadAddress."""
    try:
        address, port = parse_endpoint(text)
        return AddressTarget(network, address, port)
    except BadAddress:
        name, colon, port_text = text.rpartition(":")
        if not colon or "." not in name or ":" in name or name.replace(".", "").isdigit():
            raise BadAddress(f"expected IP:PORT, or SERVICE:PORT with two labels or more, got {text!r}") from None
    return ServiceTarget(network, normalise(name), parse_port(port_text))


def describe(name: str, domain: str) -> dict[str, object]:
    """Describe a name as fields, for people and programs. Raises BadName."""
    target = decode(name, domain)
    if isinstance(target, PlainName):
        return {"kind": "plain", "service": target.name, "note": "counts where the using network imports it"}
    kind: dict[str, object]
    if isinstance(target, AddressTarget):
        kind = {"kind": "address", "address": format_endpoint(target.address, target.port)}
    else:
        kind = {"kind": "service", "service": target.service, "port": target.port}
    return {**kind, "network": target.network, **forms(target, domain)}


def forms(target: AddressTarget | ServiceTarget, domain: str) -> dict[str, str]:
    """Return the target's names, the compact one first, unless its first label is too long. Raises BadName."""
    made = {}
    for form in (Form.COMPACT, Form.MANGLED):
        try:
            made[str(form)] = encode(target, domain, form)
        except BadName as error:
            if form is Form.MANGLED or error.reason is not NameReason.LABEL_TOO_LONG:
                raise
    return made
