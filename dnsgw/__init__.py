"""dnsgw: the resolver that a network's clients use.

Cross-network names get the address of a relay of this network; everything else is asked of upstream and kept for as long as
upstream says. It does not recurse or validate.

    server               the sockets, and where the parts meet          config   what a server is told
    listen/              UDP, TCP, and whose turn it is
    resolver             one packet → its reply                         pending_query  what waits for one
    precedence           whether an imported name is ours or upstream's
    mesh_zone/           (S) what is answered by ourselves: names of the mesh, virtual addresses, local zones
    upstream/            everything else:
      resolver, cache      from the cache or an upstream, and when neither has it
      forwarder            which upstream, when the next, how long; suspicion: what may be forged
      server               one upstream: its UDP sockets; stream_client: TCP and TLS; https_client
      host_resolvers       those of resolv.conf, and which are ourselves
      address, capabilities, verify   (S) where it is, what it can do, which packets are believed
    message/             (S) questions, replies of ours, upstream's replies, and what is put together of both
    client_limits        (S) who may ask, and how much                  metrics  what is counted

(S): sans-IO.
"""

from dnsgw.config import DnsConfig
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.server import DnsServer, UpstreamLoop
from dnsgw.upstream.host_resolvers import Endpoint

__all__ = ["DnsConfig", "DnsMetrics", "DnsServer", "Endpoint", "Outcome", "UpstreamLoop"]
