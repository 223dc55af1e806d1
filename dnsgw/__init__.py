"""dnsgw: the resolver that a network's clients use.

Cross-network names resolve to the address of a relay of this network. All other questions are forwarded to an upstream
resolver, and its answers are cached for as long as their TTL says. It does not recurse or validate.

    server               the sockets, and how the parts are connected   config   configuration of a server
    listen/              UDP, TCP, and fair shares for clients
    resolver             one packet → its reply                         pending_query  a question that waits for its reply
    precedence           whether an imported name is ours or upstream's
    mesh_zone/           (S) answers of our own: names of the mesh, virtual addresses, local zones
    upstream/            everything else:
      resolver, cache      answers from the cache or an upstream, and stale ones if neither has one
      forwarder            which upstream, when the next, how long; suspicion: packets that may be forged
      server               one upstream: its UDP sockets; stream_client: TCP and TLS; https_client
      host_resolvers       the name servers of resolv.conf, and which of them are this server
      address, capabilities, verify   (S) where an upstream is, what it supports, which packets are accepted
    message/             (S) questions, our own replies, upstream's replies, and replies composed of both
    client_limits        (S) which clients may ask, and how much        metrics  counters

(S): sans-IO.
"""

from dnsgw.config import DnsConfig
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.server import DnsServer, UpstreamLoop
from dnsgw.upstream.host_resolvers import Endpoint

__all__ = ["DnsConfig", "DnsMetrics", "DnsServer", "Endpoint", "Outcome", "UpstreamLoop"]
