"""Long-term and REST credentials, nonces, and what a server says about them."""

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnreg.stun.auth import (
    Accepted,
    Authenticator,
    AuthReason,
    Refused,
    client_key,
    long_term_key,
    rest_credentials,
    rest_expiry,
    rest_password,
)
from turnreg.stun.message import Attribute, Message, MessageClass, Method

NOW = 1_795_000_000.0
CLIENT = "192.0.2.1"
REALM = "lab"


def authenticator(**options: object) -> Authenticator:
    settings: dict[str, object] = {
        "realm": REALM,
        "nonce_secret": b"n" * 32,
        "users": {"u": "p", "1795000000:named": "p"},
        "secrets": ("north", "south"),
    }
    return Authenticator(**(settings | options))  # type: ignore[arg-type]


def request(
    username: str,
    password: str,
    nonce: str,
    *,
    method: Method = Method.ALLOCATE,
    realm: str = REALM,
    lifetime_s: int | None = None,
) -> Message:
    message = Message(method, MessageClass.REQUEST, bytes(12))
    message = message.with_text(Attribute.USERNAME, username).with_text(Attribute.REALM, realm)
    message = message.with_text(Attribute.NONCE, nonce)
    if lifetime_s is not None:
        message = message.with_number(Attribute.LIFETIME, lifetime_s)
    return Message.parse(message.pack(integrity_key=long_term_key(username, realm, password)))


def refusal(
    server: Authenticator, message: Message, *, client: str = CLIENT, now: float = NOW
) -> tuple[int, AuthReason]:
    verdict = server.check(message, client, now)
    assert isinstance(verdict, Refused)
    return verdict.code, verdict.reason


class TestKeys:
    def test_long_term_key_is_the_md5_of_the_three(self) -> None:
        assert long_term_key("u", "lab", "p") == hashlib.md5(b"u:lab:p").digest()

    def test_realm_and_password_are_opaque_strings(self) -> None:
        assert long_term_key("u", "r", "e\u0301") == long_term_key("u", "r", "\u00e9")
        assert long_term_key("u", "r", "a\u3000b") == long_term_key("u", "r", "a b")
        assert long_term_key("u", "r", "P") != long_term_key("u", "r", "p")
        assert long_term_key("e\u0301", "r", "p") != long_term_key("\u00e9", "r", "p")

    def test_rest_credentials(self) -> None:
        username, password = rest_credentials("north", "gw-1", NOW + 0.9)
        assert username == "1795000000:gw-1"
        assert password == base64.b64encode(hmac.digest(b"north", username.encode(), "sha1")).decode()
        assert password == rest_password("north", username)

    @pytest.mark.parametrize(
        ("username", "expiry"),
        [
            ("1795000000:gw", 1_795_000_000.0),
            ("0:gw:b", 0.0),
            ("gw", None),
            ("1795000000", None),
            ("1795000000:", None),
            (":gw", None),
            ("-1:gw", None),
            ("1e9:gw", None),
            ("\u0661:gw", None),
            ("9" * 13 + ":gw", None),
        ],
    )
    def test_rest_expiry(self, username: str, expiry: float | None) -> None:
        assert rest_expiry(username) == expiry

    @pytest.mark.parametrize(
        ("address", "key"),
        [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8:1:2::", "2001:db8:1:2::/64"),
            ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ],
    )
    def test_client_key(self, address: str, key: str) -> None:
        assert client_key(address) == key


class TestCheck:
    def test_user(self) -> None:
        server = authenticator()
        verdict = server.check(request("u", "p", server.nonce(CLIENT, NOW)), CLIENT, NOW)
        assert verdict == Accepted(username="u", account="u", key=long_term_key("u", REALM, "p"))
        assert "key" not in repr(verdict)

    @pytest.mark.parametrize("secret", ["north", "south"])
    def test_either_rest_secret(self, secret: str) -> None:
        server = authenticator()
        username, password = rest_credentials(secret, "gw:1", NOW + 1)
        verdict = server.check(request(username, password, server.nonce(CLIENT, NOW)), CLIENT, NOW)
        assert isinstance(verdict, Accepted)
        assert verdict.username == username
        assert verdict.account == "gw:1"
        assert verdict.key == long_term_key(username, REALM, password)

    def test_a_user_may_be_named_like_a_rest_one(self) -> None:
        server = authenticator()
        verdict = server.check(request("1795000000:named", "p", server.nonce(CLIENT, NOW)), CLIENT, NOW + 10)
        assert isinstance(verdict, Accepted)
        assert verdict.account == "1795000000:named"

    def test_without_credentials(self) -> None:
        message = Message(Method.ALLOCATE, MessageClass.REQUEST, bytes(12))
        assert refusal(authenticator(), message) == (401, AuthReason.NO_CREDENTIALS)
        named = message.with_text(Attribute.USERNAME, "u").with_text(Attribute.REALM, REALM)
        assert refusal(authenticator(), Message.parse(named.pack())) == (401, AuthReason.NO_CREDENTIALS)

    @pytest.mark.parametrize("missing", [Attribute.USERNAME, Attribute.REALM, Attribute.NONCE])
    def test_signed_but_incomplete(self, missing: Attribute) -> None:
        server = authenticator()
        whole = request("u", "p", server.nonce(CLIENT, NOW))
        part = Message(
            whole.method, whole.message_class, bytes(12), tuple(a for a in whole.attributes if a[0] != missing)
        )
        part = Message.parse(part.pack(integrity_key=long_term_key("u", REALM, "p")))
        assert refusal(server, part) == (400, AuthReason.BAD_REQUEST)

    @pytest.mark.parametrize(
        ("attribute", "value"),
        [
            (Attribute.USERNAME, b"\xff"),
            (Attribute.USERNAME, b""),
            (Attribute.USERNAME, b"u" * 600),
            (Attribute.LIFETIME, b"\0"),
        ],
    )
    def test_malformed(self, attribute: Attribute, value: bytes) -> None:
        server = authenticator()
        message = Message(Method.REFRESH, MessageClass.REQUEST, bytes(12)).with_bytes(attribute, value)
        for kind in (Attribute.USERNAME, Attribute.REALM, Attribute.NONCE):
            message = message.with_text(kind, "x")
        message = Message.parse(message.pack(integrity_key=b"k"))
        assert refusal(server, message) == (400, AuthReason.BAD_REQUEST)

    def test_the_answer_does_not_tell_whether_a_user_exists(self) -> None:
        server = authenticator()
        nonce = server.nonce(CLIENT, NOW)
        expired = rest_credentials("north", "gw", NOW)
        verdicts = [
            server.check(request("u", "wrong", nonce), CLIENT, NOW),
            server.check(request("nobody", "p", nonce), CLIENT, NOW),
            server.check(request("u", "wrong", "stale"), CLIENT, NOW),
            server.check(request("nobody", "p", "stale"), CLIENT, NOW),
            server.check(request(f"{int(NOW) + 9}:gw", "p", nonce), CLIENT, NOW),
            server.check(request(expired[0], "wrong", nonce), CLIENT, NOW),
        ]
        assert {(v.code, v.phrase) for v in verdicts if isinstance(v, Refused)} == {(401, "Unauthorized")}
        assert len([v for v in verdicts if isinstance(v, Refused)]) == 6

    def test_only_the_holder_of_the_secret_is_told_how_long_ago_its_name_expired(self) -> None:
        server = authenticator()
        expired = rest_credentials("north", "gw", NOW - 90)
        verdict = server.check(request(*expired, server.nonce(CLIENT, NOW)), CLIENT, NOW)
        assert verdict == Refused(code=401, phrase="Expired 90 s ago by this server's clock", reason=AuthReason.EXPIRED)

    def test_another_realm_is_a_wrong_password(self) -> None:
        server = authenticator()
        message = request("u", "p", server.nonce(CLIENT, NOW), realm="elsewhere")
        assert refusal(server, message) == (401, AuthReason.WRONG_PASSWORD)

    def test_nobody_signs_with_the_key_tried_for_unknown_users(self) -> None:
        message = Message(Method.ALLOCATE, MessageClass.REQUEST, bytes(12)).with_text(Attribute.USERNAME, "nobody")
        message = message.with_text(Attribute.REALM, REALM).with_text(Attribute.NONCE, "x")
        message = Message.parse(message.pack(integrity_key=b"n" * 32))
        assert refusal(authenticator(), message) == (401, AuthReason.UNKNOWN_USER)

    @pytest.mark.parametrize(
        ("method", "lifetime_s", "accepted"),
        [
            (Method.ALLOCATE, None, False),
            (Method.ALLOCATE, 0, False),
            (Method.REFRESH, None, False),
            (Method.REFRESH, 600, False),
            (Method.REFRESH, 0, True),
            (Method.CREATE_PERMISSION, None, True),
            (Method.CONNECTION_BIND, None, True),
        ],
    )
    def test_an_expired_rest_name_cannot_allocate_or_extend(
        self, method: Method, lifetime_s: int | None, accepted: bool
    ) -> None:
        server = authenticator()
        username, password = rest_credentials("north", "gw", NOW)
        nonce = server.nonce(CLIENT, NOW)
        message = request(username, password, nonce, method=method, lifetime_s=lifetime_s)
        assert isinstance(server.check(message, CLIENT, NOW - 1), Accepted)
        assert isinstance(server.check(message, CLIENT, NOW), Accepted) is accepted
        if not accepted:
            assert refusal(server, message) == (401, AuthReason.EXPIRED)


class TestNonce:
    def test_lives_as_long_as_told(self) -> None:
        server = authenticator(nonce_lifetime_s=5.0)
        nonce = server.nonce(CLIENT, NOW)
        message = request("u", "p", nonce)
        assert isinstance(server.check(message, CLIENT, NOW + 4.9), Accepted)
        assert refusal(server, message, now=NOW + 5) == (438, AuthReason.STALE_NONCE)
        assert refusal(server, message, now=NOW - 60) == (438, AuthReason.STALE_NONCE)  # the clock was set back

    def test_is_bound_to_the_client(self) -> None:
        server = authenticator()
        message = request("u", "p", server.nonce(CLIENT, NOW))
        assert refusal(server, message, client="192.0.2.2") == (438, AuthReason.STALE_NONCE)
        message = request("u", "p", server.nonce("2001:db8::1", NOW))
        assert isinstance(server.check(message, "2001:db8::2", NOW), Accepted)  # the same /64

    def test_is_bound_to_the_server(self) -> None:
        message = request("u", "p", authenticator(nonce_secret=b"o" * 32).nonce(CLIENT, NOW))
        assert refusal(authenticator(), message) == (438, AuthReason.STALE_NONCE)

    def test_makes_no_promise_of_security_features(self) -> None:
        assert not authenticator().nonce(CLIENT, NOW).startswith("obMatJos2")  # RFC 8489, section 9.2

    @given(st.text(max_size=60) | st.text("0123456789abcdef", min_size=43, max_size=43))
    def test_no_other_text_is_one(self, text: str) -> None:
        server = authenticator()
        assert refusal(server, request("u", "p", text)) == (438, AuthReason.STALE_NONCE)

    def test_no_bit_of_it_can_be_changed(self) -> None:
        server = authenticator()
        nonce = server.nonce(CLIENT, NOW)
        for at, old in enumerate(nonce):
            changed = nonce[:at] + ("1" if old == "0" else "0") + nonce[at + 1 :]
            assert refusal(server, request("u", "p", changed)) == (438, AuthReason.STALE_NONCE)
