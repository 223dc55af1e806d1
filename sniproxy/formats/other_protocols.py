"""Recognises what a client speaks instead of TLS by its first bytes, so that the log can say what to change. Sans-IO.

The relay routes by the name in a ClientHello, so TLS has to come first. Many protocols have a way to do that.
"""

import re
from typing import Final

WRAPPED: Final = "or TLS around it (stunnel)"

_PROTOCOLS: Final = (
    (rb"\0\0\0\x08\x04\xd2\x16[\x2f\x30]", f"PostgreSQL: sslnegotiation=direct (libpq 17 and later), {WRAPPED}"),
    (rb"\0\0..\0\x03\0.", f"PostgreSQL without TLS: sslmode=require sslnegotiation=direct (libpq 17), {WRAPPED}"),
    (rb"(?:GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|TRACE|CONNECT) |PRI \* HTTP/2", "HTTP without TLS: use https"),
    (rb"SSH-", "SSH, which has no TLS: a ProxyCommand with openssl s_client, and a service that ends that TLS"),
    (rb"(?i:EHLO|HELO|LHLO) ", "SMTP with STARTTLS: use implicit TLS (smtps, port 465)"),
    (rb"(?i)[a-z0-9.]{1,16} (?:CAPABILITY|STARTTLS|LOGIN|ID|NOOP)\b", "IMAP with STARTTLS: use implicit TLS (imaps)"),
    (rb"(?i)(?:CAPA|STLS)\r?\n", "POP3 with STLS: use implicit TLS (pop3s)"),
    (rb"(?i)(?:AUTH TLS|AUTH SSL)\r?\n", "FTP with AUTH TLS: use implicit TLS (ftps)"),
    (rb"<\?xml|<stream:", "XMPP with STARTTLS: use direct TLS (xmpps)"),
    (rb"0.{1,5}\x02\x01.", "LDAP, perhaps with StartTLS: use ldaps"),
    (rb"\x12\x01\0", f"SQL Server: Encrypt=Strict (TDS 8.0), {WRAPPED}"),
    (rb"\x03\0\0.", f"RDP with its own negotiation of TLS: {WRAPPED.removeprefix('or ')}"),
    (rb".{12}(?:\xdd\x07|\xd4\x07)\0\0", "MongoDB without TLS: tls=true"),
    (rb"\*[0-9]{1,3}\r\n\$|PING\r\n", "Redis without TLS: rediss:// or --tls"),
    (rb"AMQP", "AMQP without TLS: use amqps"),
    (rb"\x10.{1,4}\0[\x04\x06]MQ", "MQTT without TLS: use mqtts"),
    (
        rb"PROXY |\r\n\r\n\0\r\nQUIT\n",
        "a PROXY header: if a load balancer sends it, relay.proxy_from needs its address",
    ),
    (rb"\x05[\x01-\x09][\0-\x09]|\x04\x01", "SOCKS: the relay is no proxy; connect to it as to the service itself"),
    (rb"\x16\xfe[\xfd\xff]", "DTLS: the relay carries TCP alone"),
    (rb"[\x14\x15\x17]\x03[\0-\x04]", "TLS, but not its first message: perhaps the rest of another connection"),
    (rb"[\x80-\xbf].\x01", "SSL 2.0, or TLS in its oldest form: use TLS 1.2 or later"),
)
_STARTS: Final = tuple((re.compile(start, re.DOTALL), meaning) for start, meaning in _PROTOCOLS)

_SPEAKS_FIRST: Final = {
    21: "FTP: use implicit TLS (ftps)",
    25: "SMTP: use implicit TLS (smtps, port 465)",
    110: "POP3: use implicit TLS (pop3s)",
    143: "IMAP: use implicit TLS (imaps)",
    587: "SMTP: use implicit TLS (smtps, port 465)",
    3306: f"MySQL: {WRAPPED.removeprefix('or ')}",
}
"""By port: protocols whose clients wait until the server has spoken, even if they use TLS later."""

LONGEST_START: Final = 16
"""No pattern needs more bytes than this to match."""


def recognise(start: bytes) -> str | None:
    """Return the protocol that begins like this and what to use instead, None if it is not known."""
    for pattern, meaning in _STARTS:
        if pattern.match(start):
            return meaning
    return None


def silent(port: int) -> str:
    """Return what a client speaks that connected to this port and waits for the server, and what to use instead."""
    known = _SPEAKS_FIRST.get(port, "MySQL, SMTP, IMAP, FTP and others: use their implicit TLS (smtps, imaps, ftps)")
    return f"a protocol in which the server speaks first, such as {known}"
