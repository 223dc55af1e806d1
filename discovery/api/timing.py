"""Intervals and deadlines of a discovery server."""

from dataclasses import dataclass, field

from discovery.http.listener import ListenerTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchTiming:
    """How long a watch waits, in seconds."""

    heartbeat_s: float = 10.0
    """An empty line is sent after this time without a change; clients give up after 25 s of silence."""

    write_timeout_s: float = 30.0
    """A watcher that reads nothing for this long is cut off."""

    stale_watch_s: float = 30.0
    """A server that is cut off from its store ends a watch after this time, so that the client tries another server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTiming:
    """Intervals of a server's background work, and deadlines for its clients, in seconds. Tests shorten them."""

    sweep_s: float = 0.5
    """How often expired leases are looked for. Records are deleted at most this time, plus one write, after their lease ended."""

    reload_s: float = 2.0
    """How often the tokens file and the certificates are checked for changes."""

    watch: WatchTiming = field(default_factory=WatchTiming)
    connections: ListenerTiming = field(default_factory=ListenerTiming)


TIMING = ServerTiming()
