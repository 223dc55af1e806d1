"""What an upstream supports: whether it preserves the case of names, understands EDNS, and has cookies (RFC 7873).

All of this is learned from its answers. Missing features are tried again every hour. Sans-IO: time is an argument, in seconds of
any one clock, and so is randomness.
"""

from dnsgw.message import cookie

TRY_AGAIN_S = 3600.0
NEW_COOKIE_S = 86400.0  # RFC 7873 section 7.1 allows up to 36 days; daily is not too often
STREAM_DOWN_S = 30.0
MAX_SOURCES = 16  # our own addresses for which cookies are kept


class _Cookie:
    __slots__ = ("client", "server", "since")

    def __init__(self, client: bytes, since: float) -> None:
        self.client = client
        self.server = b""
        self.since = since


class Capabilities:
    """The capabilities of one upstream."""

    __slots__ = ("_address", "_case_off", "_cookies", "_edns_off", "_secret", "_stream_down", "edns_seen")

    def __init__(self, address: bytes, secret: bytes) -> None:
        """Assume that it supports all but cookies. `address` is packed; `secret`, 16 random bytes, is for the client cookies."""
        self._address = address
        self._secret = secret
        self._case_off = self._edns_off = self._stream_down = 0.0
        self._cookies: dict[bytes, _Cookie] = {}
        self.edns_seen = False
        """It sent an OPT record at least once."""

    def keeps_case(self, now: float) -> bool:
        """Whether to ask it in random case."""
        return now >= self._case_off

    def lost_case(self, now: float) -> None:
        """Note that it changed the case in an answer over TCP, which is not forged."""
        self._case_off = now + TRY_AGAIN_S

    def takes_edns(self, now: float) -> bool:
        """Whether to ask it with OPT."""
        return now >= self._edns_off

    def refused_edns(self, now: float) -> None:
        """Note that it did not understand OPT."""
        self._edns_off = now + TRY_AGAIN_S

    def takes_streams(self, now: float) -> bool:
        """Whether TCP is worth a try: it has not failed lately."""
        return now >= self._stream_down

    def refused_stream(self, now: float) -> None:
        """Note that it did not answer over TCP."""
        self._stream_down = now + STREAM_DOWN_S

    def cookie(self, source: bytes, now: float) -> tuple[bytes, bytes]:
        """Return the client cookie and the server cookie to send from our address `source`; the latter may be empty.

        The client cookie depends on both addresses (RFC 9018 section 3), so it neither reveals to one server what another knows
        nor lets a server track us across addresses.
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
        """Store the server cookie of an answer if its client cookie is ours; one of invalid length counts as none."""
        kept = self._cookies.get(source)
        if kept is not None and said[: cookie.CLIENT_SIZE] == kept.client:
            whole = cookie.CLIENT_SIZE < len(said) <= cookie.MAX_SIZE
            kept.server = said[cookie.CLIENT_SIZE :] if whole else b""

    def lost_cookies(self) -> None:
        """Note that it answers without a cookie over TCP, where nobody can forge."""
        for kept in self._cookies.values():
            kept.server = b""

    @property
    def has_cookies(self) -> bool:
        """Whether it sends cookies."""
        return any(kept.server for kept in self._cookies.values())
