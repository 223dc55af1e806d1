"""Tokens: which records a client may write, and what it may see.

A tokens file is a list (YAML, of which JSON is a part):

    - {name: gw-1, hash: 5f0c…, network: b, kinds: [allocation, gateway]}
    - {name: publisher, hash: 91ab…, network: b, kinds: [service], names: ["*.shop.svc.cluster.local"]}
    - {name: operator, hash: 77d0…, admin: true}
    - {name: gw-2, certificate: "spiffe://mesh.example/b/gw-2", network: b, kinds: [allocation, gateway]}

It holds SHA-256 hashes of tokens. Tokens are 256 random bits, so a plain hash is enough. Instead of a hash an entry can name a
client certificate, by a URI (such as a SPIFFE id; `*` as the last segment matches everything below) or a DNS name among its
subjectAltNames.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from discovery.files.yaml_file import BadFile, read_records
from discovery.model.mesh import AnyRecord, Key, Kind, ServiceSpec, Spec
from discovery.model.names import is_ldh_label, is_service_name
from discovery.model.validation import Fault, shape_faults, shown

MAX_TOKENS = 10_000
TOKEN_PREFIX = "crossnet-"  # noqa: S105 - lets secret scanners recognise leaked tokens

_NAME = re.compile(r"[A-Za-z0-9._-]{0,63}")  # goes into TURN usernames, where ':' is a separator

_CERTIFICATE = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9._/-]{1,200}(?:/\*)?|[a-z0-9-]+(?:\.[a-z0-9-]+)+")

SEEN_BY_ALL = frozenset({Kind.NETWORK, Kind.RELAY, Kind.TURN, Kind.ALLOCATION, Kind.GATEWAY, Kind.SERVICE})
"""Kinds of records that other networks may read. Of services they see names and ports, never endpoints."""


class TokenEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One item of a tokens file."""

    hash: str | None = None
    """SHA-256 of the token, 64 hexadecimal digits."""

    certificate: str | None = None
    """URI or DNS name in a client certificate, instead of a token."""

    name: str = ""
    """Name in logs and TURN usernames. The default is the first 12 digits of the hash, or the certificate's name."""

    network: str | None = None
    """Network whose records it may write and whose endpoints it may read. Only an admin needs none."""

    kinds: list[str] = []
    """Kinds of records that it may write."""

    names: list[str] = []
    """Globs of the services that it may write: `*` is one label, a leading `**` is one or more."""

    admin: bool = False
    """May read and write everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The client behind a token or certificate, and its rights."""

    name: str
    network: str | None
    kinds: frozenset[Kind]
    names: tuple[str, ...] = ()
    admin: bool = False
    owner: str
    """Owner of its leases. Differs between tokens, and does not change when a token is renamed."""

    def refusal_to_write(self, key: Key, specs: Iterable[Spec] = ()) -> str | None:
        """Return why it may not write under this key, None if it may.

        `specs` are the current and the new spec: both must have a name that the token covers, so that it can neither take over a
        service nor rename one. Neither can it add members or another name to one that it does not cover.
        """
        if self.admin:
            return None
        kind, network, _ = key
        if network != self.network:
            return f"the token belongs to network {self.network!r}, not {network!r}"
        if kind not in self.kinds:
            return f"the token may not write {kind} records"
        for spec in specs:
            if isinstance(spec, ServiceSpec):
                for name in filter(None, (spec.name, spec.member_of, spec.alias_of)):
                    if not any(matches(glob, name) for glob in self.names):
                        return f"the token does not cover the service name {name!r}"
        return None

    def refusal_of_credentials(self) -> str | None:
        """Return why it may not have TURN credentials, None if it may. Only clients that register allocations need them."""
        if self.admin or Kind.ALLOCATION in self.kinds:
            return None
        return "TURN credentials are only for tokens that may write allocation records"

    def sees_all_of(self, network: str) -> bool:
        """Return whether it may read everything of a network, including endpoints."""
        return self.admin or network == self.network

    def view(self, record: AnyRecord) -> AnyRecord | None:
        """Return the record as it may see it, None if it may not."""
        return record if self.sees_all_of(record.network) else redacted(record)


OPEN = Principal(name="anyone", network=None, kinds=frozenset(Kind), admin=True, owner="anyone")
"""The principal of every client if no tokens are configured."""


def redacted(record: AnyRecord) -> AnyRecord | None:
    """Return a record as other networks see it: without lease id, and services without endpoints and checks. None for a vip."""
    if record.kind not in SEEN_BY_ALL:
        return None
    spec = record.spec
    if isinstance(spec, ServiceSpec):
        spec = msgspec.structs.replace(spec, ports={port: [] for port in spec.ports}, health=None)
    return msgspec.structs.replace(record, lease=None, spec=spec)


def matches(glob: str, name: str) -> bool:
    """Return whether a glob matches a service name: `*` is exactly one label, a leading `**` one or more."""
    pattern, labels = glob.split("."), name.split(".")
    if pattern[0] == "**":
        pattern = pattern[1:]
        if len(labels) <= len(pattern):
            return False
        labels = labels[len(labels) - len(pattern) :]
    return len(pattern) == len(labels) and all(
        part in ("*", label) for part, label in zip(pattern, labels, strict=True)
    )


def make_token() -> str:
    """Generate a token of 256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """Return the hash of a token as in a tokens file."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_entry(
    token: str | None,
    *,
    certificate: str | None = None,
    name: str = "",
    network: str | None = None,
    kinds: Sequence[Kind] = (),
    names: Sequence[str] = (),
    admin: bool = False,
) -> TokenEntry:
    """Make the entry of a token or a certificate for a tokens file. Raises BadFile if it is invalid."""
    entry = TokenEntry(
        hash=hash_token(token) if token is not None else None,
        certificate=certificate,
        name=name,
        network=network,
        kinds=[*map(str, kinds)],
        names=[*names],
        admin=admin,
    )
    faults = list(_entry_faults(entry, "$"))
    if faults:
        raise BadFile("token", faults)
    return entry


def format_entry(entry: TokenEntry) -> str:
    """Format an entry as one line of a tokens file."""
    return "- " + msgspec.json.encode(entry).decode()


class Tokens:
    """All tokens and certificates that a server accepts."""

    def __init__(self, entries: Iterable[TokenEntry] = ()) -> None:
        """The entries must be valid; `Tokens.load` reads and checks a file."""
        entries = list(entries)
        self._known = {
            bytes.fromhex(entry.hash): _principal(entry, entry.hash) for entry in entries if entry.hash is not None
        }
        self._certificates = {
            entry.certificate: _principal(entry, hash_token(f"certificate {entry.certificate}"))
            for entry in entries
            if entry.certificate is not None
        }

    @classmethod
    def load(cls, path: Path) -> "Tokens":
        """Read a tokens file. Raises BadFile with all errors in it."""
        data = read_records(path)
        entries: list[TokenEntry] = []
        if data is None:
            data = []
        faults = list(shape_faults(data, list[TokenEntry]))
        if not faults:
            entries = msgspec.convert(data, list[TokenEntry])
            faults.extend(_list_faults(entries))
        if faults:
            raise BadFile(str(path), faults)
        return cls(entries)

    def find(self, token: str) -> Principal | None:
        """Return the principal of a token, None if it is unknown.

        This is a dictionary lookup by hash. A client cannot choose the digests that are compared, so the time it takes reveals
        nothing; and it takes no longer with 10,000 tokens than with one.
        """
        return self._known.get(hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest())

    def find_certificate(self, names: Iterable[str]) -> Principal | None:
        """Return the principal of a verified certificate, by the longest of its URIs and DNS names that is listed."""
        found: str | None = None
        for name in names:
            for listed in (name, *_above(name)):
                if listed in self._certificates and len(listed) > len(found or ""):
                    found = listed
                    break
        return self._certificates[found] if found is not None else None

    def still(self, principal: Principal) -> bool:
        """Return whether a principal found earlier still has the same rights."""
        return principal in self._known.values() or principal in self._certificates.values()

    def __len__(self) -> int:
        return len(self._known) + len(self._certificates)


def _above(name: str) -> Iterator[str]:
    """Yield the globs that cover a URI, longest first."""
    scheme, separator, rest = name.partition("://")
    if not separator:
        return
    segments = rest.split("/")
    for count in range(len(segments) - 1, 0, -1):
        yield f"{scheme}://{'/'.join(segments[:count])}/*"


def _principal(entry: TokenEntry, digest: str) -> Principal:
    return Principal(
        name=entry.name or (entry.certificate or digest[:12])[:63],
        network=entry.network,
        kinds=frozenset(Kind) if entry.admin else frozenset(map(Kind, entry.kinds)),
        names=tuple(entry.names),
        admin=entry.admin,
        owner=digest[:32],
    )


def _list_faults(entries: Sequence[TokenEntry]) -> Iterator[Fault]:
    if len(entries) > MAX_TOKENS:
        yield Fault("$", f"at most {MAX_TOKENS} tokens", str(len(entries)))
        return
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        yield from _entry_faults(entry, f"$[{index}]")
        which = "hash" if entry.certificate is None else "certificate"
        first = seen.setdefault(str(getattr(entry, which)).lower(), index)
        if first != index:
            yield Fault(f"$[{index}].{which}", "each token once", f"that of $[{first}]")


def _entry_faults(entry: TokenEntry, path: str) -> Iterator[Fault]:
    if (entry.hash is None) == (entry.certificate is None):
        yield Fault(path, "a hash or a certificate", "neither" if entry.hash is None else "both")
    if entry.certificate is not None and not _CERTIFICATE.fullmatch(entry.certificate):
        yield Fault(
            f"{path}.certificate", "a URI such as spiffe://mesh.example/b/gw, or a DNS name", shown(entry.certificate)
        )
    if entry.hash is not None and (len(entry.hash) != 64 or not set(entry.hash) <= set("0123456789abcdef")):
        # Not shown: it may be the token itself, put here by mistake, and must not be logged.
        yield Fault(f"{path}.hash", "the SHA-256 of a token, 64 lower-case hexadecimal digits", "something else")
    if not _NAME.fullmatch(entry.name):
        yield Fault(f"{path}.name", "letters, digits, '-', '.' and '_', 63 at most", shown(entry.name))
    if entry.network is None:
        if not entry.admin:
            yield Fault(f"{path}.network", "a network id, or admin: true", "nothing")
    elif not is_ldh_label(entry.network):
        yield Fault(f"{path}.network", "a network id", shown(entry.network))
    kinds = set(Kind)
    for index, kind in enumerate(entry.kinds):
        if kind not in kinds:
            yield Fault(f"{path}.kinds[{index}]", f"one of {', '.join(Kind)}", shown(kind))
    for index, glob in enumerate(entry.names):
        if not _is_glob(glob):
            yield Fault(
                f"{path}.names[{index}]", "a service name whose labels may be '*', the first one '**'", shown(glob)
            )


def _is_glob(glob: str) -> bool:
    labels = glob.split(".")
    if labels[0] == "**":
        labels = ["x", "x", *labels[1:]]
    return is_service_name(".".join("x" if label == "*" else label for label in labels))
