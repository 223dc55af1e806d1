"""What is known of an upstream: whether it keeps the case of names, understands EDNS, and has cookies (RFC 7873).

All of it is found out by asking. What it cannot do is tried again every hour. Sans-IO: time comes as an argument, in
seconds of any one clock, and randomness too.
"""

from dnsgw.message import cookie

TRY_AGAIN_S = 3600.0
NEW_COOKIE_S = 86400.0  # RFC 7873 section 7.1: at most 36 days, at least a day is no burden
STREAM_DOWN_S = 30.0
MAX_SOURCES = 16  # addresses of ours that cookies are kept for


class _Cookie:
    __slots__ = ("client", "server", "since")

    def __init__(self, client: bytes, since: float) -> None:
        self.client = client
        self.server = b""
        self.since = since


class Capabilities:
    """Of one upstream."""

    __slots__ = ("_address", "_case_off", "_cookies", "_edns_off", "_secret", "_stream_down", "edns_seen")

    def __init__(self, address: bytes, secret: bytes) -> None:
        """Start without knowledge of the upstream. `secret` is for the cookies to this address, 16 random bytes."""
        self._address = address
        self._secret = secret
        self._case_off = self._edns_off = self._stream_down = 0.0
        self._cookies: dict[bytes, _Cookie] = {}
        self.edns_seen = False
        """It sent an OPT record at least once."""

    def keeps_case(self, now: float) -> bool:
        """Tell whether it is to be asked in random case."""
        return now >= self._case_off

    def lost_case(self, now: float) -> None:
        """Note that it changed the case in an answer that cannot be forged."""
        self._case_off = now + TRY_AGAIN_S

    def takes_edns(self, now: float) -> bool:
        """Tell whether it is to be asked with OPT."""
        return now >= self._edns_off

    def refused_edns(self, now: float) -> None:
        """Note that it did not understand OPT."""
        self._edns_off = now + TRY_AGAIN_S

    def takes_streams(self, now: float) -> bool:
        """Tell whether it may answer over TCP: it was not tried lately in vain."""
        return now >= self._stream_down

    def refused_stream(self, now: float) -> None:
        """Note that it did not answer over TCP."""
        self._stream_down = now + STREAM_DOWN_S

    def cookie(self, source: bytes, now: float) -> tuple[bytes, bytes]:
        """The client's and the server's half of the cookie to send from this address of ours; the second may be empty.

        The client's half depends on both addresses (RFC 9018 section 3), so that it neither tells one server what another
        one knows nor follows us to another address.
        """
        kept = self._cookies.get(source)
        if kept is None or now - kept.since >= NEW_COOKIE_S:
            if len(self._cookies) >= MAX_SOURCES:
                self._cookies.clear()
            client = cookie.siphash24(
                self._secret, self._address + source + int(now // NEW_COOKIE_S).to_bytes(8, "big")
            )
            kept = self._cookies[source] = _Cookie(client, now)
        return kept.client, kept.server

    def learned_cookie(self, source: bytes, said: bytes) -> None:
        """Note the cookie of an answer, whose client's half is ours; too short or too long: it has none."""
        kept = self._cookies.get(source)
        if kept is not None and said[: cookie.CLIENT_SIZE] == kept.client:
            whole = cookie.CLIENT_SIZE < len(said) <= cookie.MAX_SIZE
            kept.server = said[cookie.CLIENT_SIZE :] if whole else b""

    def lost_cookies(self) -> None:
        """Note that it answers without a cookie where nobody can forge."""
        for kept in self._cookies.values():
            kept.server = b""

    @property
    def has_cookies(self) -> bool:
        """Whether it answers cookies."""
        return any(kept.server for kept in self._cookies.values())
