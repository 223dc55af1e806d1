"""Why a stream ended: one list for log lines, metric labels and the REFUSED capsule."""

from enum import StrEnum


class Reason(StrEnum):
    """The end of a stream. Every value is a pre-registered metric label."""

    OK = "ok"
    CLIENT_RESET = "client_reset"
    SERVER_RESET = "server_reset"
    TRUNCATED = "truncated"
    """The connection between relay and gateway was cut before both had confirmed the end."""
    IDLE_TIMEOUT = "idle_timeout"
    HELLO_TIMEOUT = "hello_timeout"
    NOT_TLS = "not_tls"
    BAD_HELLO = "bad_hello"
    NO_SNI = "no_sni"
    BAD_NAME = "bad_name"
    UNKNOWN_NETWORK = "unknown_network"
    UNKNOWN_NAME = "unknown_name"
    AMBIGUOUS_NAME = "ambiguous_name"
    AMBIGUOUS_PORT = "ambiguous_port"
    DENIED = "denied"
    WRONG_TARGET = "wrong_target"
    """The relay asks the gateway for a target that the stream's name does not have."""
    NO_VIEW = "no_view"
    """Discovery has not been heard from, and there is no snapshot: what a name leads to is not known."""
    NO_KEY = "no_key"
    NO_ROUTE = "no_route"
    NO_PERMISSION = "no_permission"
    DIAL_FAILED = "dial_failed"
    NO_ENDPOINT = "no_endpoint"
    READY_TIMEOUT = "ready_timeout"
    OPEN_TIMEOUT = "open_timeout"
    BAD_SIGNATURE = "bad_signature"
    CLOCK_SKEW = "clock_skew"
    REPLAY = "replay"
    PROTOCOL_ERROR = "protocol_error"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    OTHER = "other"


RETRYABLE = frozenset({Reason.DIAL_FAILED, Reason.OVERLOADED, Reason.DRAINING, Reason.NO_ENDPOINT, Reason.NO_VIEW})
"""Refusals after which another gateway may be asked: nothing has reached a service yet."""
