"""TURN credentials: the long-term mechanism of RFC 8489, section 9.2, and short-lived REST credentials.

REST credentials (draft-uberti-behave-turn-rest, as coturn's `--use-auth-secret` does it): the username is
`EXPIRY:NAME` with EXPIRY in unix seconds, the password is base64(HMAC-SHA1(secret, username)). Anybody who has the secret
can make them without asking the server.

`Authenticator` is the server's side and keeps no state about clients: a nonce is a time and an HMAC over that time and the client's
address, so an unauthenticated client can make the server store nothing.
"""

import base64
import binascii
import hashlib
import hmac
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv6Address, ip_address

from turnreg.stun.message import Attribute, Message, Method, StunError

NONCE_LIFETIME_S = 3600.0
"""How long a nonce is valid. RFC 8656, section 5, requires a new one at least every hour. coturn's default is 600 s, so that a
gateway that was idle for ten minutes loses its next bind unless it renews the nonce first."""

_MAX_EXPIRY_DIGITS = 12
"""Unix seconds have 10 digits until 2286; more than 12 digits are not a time."""
_NONCE_TIME_DIGITS = 11  # milliseconds since 1970 in hex, until the year 2527
_NONCE_MAC_DIGITS = 32


def long_term_key(username: str, realm: str, password: str) -> bytes:
    """Return the key of MESSAGE-INTEGRITY for long-term credentials (RFC 8489, section 9.2.2).

    Realm and password are prepared as OpaqueString (RFC 8265, section 4.2); the username is used as sent.
    """
    text = f"{username}:{_opaque(realm)}:{_opaque(password)}"
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def rest_credentials(secret: str, name: str, expires_at: float) -> tuple[str, str]:
    """Return username and password that a server with `secret` accepts until `expires_at`, unix seconds rounded down."""
    username = f"{int(expires_at)}:{name}"
    return username, rest_password(secret, username)


def rest_password(secret: str, username: str) -> str:
    """Return the password for a REST username."""
    return base64.b64encode(hmac.digest(secret.encode(), username.encode(), hashlib.sha1)).decode()


def rest_expiry(username: str) -> float | None:
    """Return the unix time at which a REST username expires, None if it is not of the form `EXPIRY:NAME`."""
    expiry, colon, name = username.partition(":")
    if not colon or not name or not expiry.isascii() or not expiry.isdigit() or len(expiry) > _MAX_EXPIRY_DIGITS:
        return None
    return float(expiry)


def client_key(address: str) -> str:
    """Return the key by which clients are distinguished: an IPv4 address, or the /64 of an IPv6 one.

    Nonces are bound to it and unauthenticated connections are counted by it. A host on IPv6 owns a whole /64 and, with privacy
    addresses, may bind from another address of it than that of its control connection.
    """
    if ":" not in address:
        return address
    host = ip_address(address)
    if isinstance(host, IPv6Address):
        if host.ipv4_mapped is not None:
            return str(host.ipv4_mapped)
        return f"{IPv6Address(int(host) >> 64 << 64)}/64"
    return str(host)


class AuthReason(StrEnum):
    """Why a request was not authenticated. For logs and metrics; the answer on the wire says less."""

    NO_CREDENTIALS = "no_credentials"
    BAD_REQUEST = "bad_request"
    UNKNOWN_USER = "unknown_user"
    WRONG_PASSWORD = "wrong_password"  # noqa: S105 - a reason, not a password
    EXPIRED = "expired"
    STALE_NONCE = "stale_nonce"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The request is from this user."""

    username: str
    account: str
    """The username, without the expiry if it is a REST username. Quotas count by it."""
    key: bytes = field(repr=False)
    """Signs the answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The request is not authenticated; answer it with `code`."""

    code: int
    """401, 438 (both with REALM and NONCE, unsigned) or 400."""
    phrase: str
    reason: AuthReason


Verdict = Accepted | Refused


class Authenticator:
    """Decides who sent a request. Users with a password and REST secrets may be used together, unlike in coturn."""

    def __init__(
        self,
        *,
        realm: str,
        nonce_secret: bytes,
        users: Mapping[str, str] | None = None,
        secrets: Iterable[str] = (),
        nonce_lifetime_s: float = NONCE_LIFETIME_S,
    ) -> None:
        """Authenticate these `users` (name to password), and REST usernames by these `secrets` (two during a rotation).

        `nonce_secret` is 32 random bytes, new at each start. In all methods, `now` is unix time in seconds.
        """
        self.realm = realm
        self._nonce_secret = nonce_secret
        self._nonce_lifetime_s = nonce_lifetime_s
        self.know(users or {}, secrets)

    def know(self, users: Mapping[str, str], secrets: Iterable[str]) -> None:
        """Replace users and secrets. Nonces stay valid, so a client whose credentials are still valid notices nothing."""
        self._keys = {name: long_term_key(name, self.realm, password) for name, password in users.items()}
        self._secrets = tuple(secrets)

    def nonce(self, client: str, now: float) -> str:
        """Return a nonce for the client at that IP address."""
        issued = f"{int(now * 1000):0{_NONCE_TIME_DIGITS}x}"
        return issued + self._nonce_mac(issued, client)

    def check(self, message: Message, client: str, now: float) -> Verdict:
        """Check the credentials of a request from the IP address `client` (RFC 8489, section 9.2.4).

        An unknown user, a wrong password and an expired REST username are all answered 401 and take the same path through the code.
        Only a client that signed with the right secret is told that its username has expired, and how long ago.

        Expiry is checked for Allocate and for a Refresh that extends the lifetime. So an allocation whose username has expired
        keeps working, permissions and binds included, until its lifetime is over (coturn ignores expiry even at Refresh).
        """
        if not message.has_integrity:
            return Refused(code=401, phrase="Unauthorized", reason=AuthReason.NO_CREDENTIALS)
        try:
            username = message.text(Attribute.USERNAME)
            realm = message.text(Attribute.REALM)
            nonce = message.text(Attribute.NONCE)
            prolongs = message.method == Method.ALLOCATE or (
                message.method == Method.REFRESH and message.number(Attribute.LIFETIME) != 0
            )
        except StunError:
            return Refused(code=400, phrase="Bad Request", reason=AuthReason.BAD_REQUEST)
        if not username or realm is None or nonce is None:
            return Refused(code=400, phrase="Bad Request", reason=AuthReason.BAD_REQUEST)
        key, reason = self._key_for(message, username)
        expiry = None if username in self._keys else rest_expiry(username)
        phrase = "Unauthorized"
        if key is not None and prolongs and expiry is not None and expiry <= now:
            key, reason = None, AuthReason.EXPIRED
            # It is signed with our secret, so its holder may know by how much the clocks differ.
            phrase = f"Expired {math.ceil(now - expiry)} s ago by this server's clock"
        if key is None:
            return Refused(code=401, phrase=phrase, reason=reason)
        if not self._nonce_is_good(nonce, client, now):
            # Checked last: a 438 to a client without the password would reveal that the user exists.
            return Refused(code=438, phrase="Stale Nonce", reason=AuthReason.STALE_NONCE)
        account = username if expiry is None else username.partition(":")[2]
        return Accepted(username=username, account=account, key=key)

    def _key_for(self, message: Message, username: str) -> tuple[bytes | None, AuthReason]:
        """Return the key that `message` is signed with, or None and the reason.

        An unknown user takes as much time as a known one: a key that cannot match is tried.
        """
        candidates = [self._keys[username]] if username in self._keys else []
        if not candidates and rest_expiry(username) is not None:
            candidates = [
                long_term_key(username, self.realm, rest_password(secret, username)) for secret in self._secrets
            ]
        known = bool(candidates)
        found: bytes | None = None
        for key in candidates or [self._nonce_secret]:
            if message.verify_integrity(key) and known:
                found = key
        return found, AuthReason.WRONG_PASSWORD if known else AuthReason.UNKNOWN_USER

    def _nonce_is_good(self, nonce: str, client: str, now: float) -> bool:
        issued, mac = nonce[:_NONCE_TIME_DIGITS], nonce[_NONCE_TIME_DIGITS:]
        if not nonce.isascii() or not hmac.compare_digest(mac, self._nonce_mac(issued, client)):
            return False
        age_s = now - int(issued, 16) / 1000  # the HMAC proves that we wrote it, so it is a number
        return -1 <= age_s < self._nonce_lifetime_s

    def _nonce_mac(self, issued: str, client: str) -> str:
        text = f"{issued} {client_key(client)}"
        mac = hmac.digest(self._nonce_secret, text.encode(), hashlib.sha256)
        return binascii.hexlify(mac).decode()[:_NONCE_MAC_DIGITS]


def _opaque(text: str) -> str:
    """Prepare a string as OpaqueString (RFC 8265, section 4.2.2): other spaces become U+0020, then NFC."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", "".join(" " if unicodedata.category(c) == "Zs" else c for c in text))
