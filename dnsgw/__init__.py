"""dnsgw: the resolver that a network's clients use.

Cross-network names get the address of a relay of this network; everything else is asked of upstream and kept for as long as
upstream says. It does not recurse or validate.

    config     what a server is told                 server     its sockets, and where the parts meet
    wire       (S) questions: the scanner            reply      (S) replies: prepared, or relayed
    intercept  (S) one question → answer or pass     rdata      (S) dnslib, for what is made once
    message    (S) upstream's replies                cache      (S) what upstream said
    admission  (S) who may ask, and how much         recent     (S) a bounded memory
    absent     (S) what nobody is asked for
    pairs      (S) A and AAAA from one table         destination (S) where an upstream is
    outgoing   (S) questions as upstream gets them   verify      (S) which packets are believed
    crowd      (S) packets by client in a flood
    abilities  (S) what an upstream can do           turns       the loop, shared out among connections
    resolver   one packet → its reply                asked      what waits, and what failures are said to be
    precedence whose an imported name is             moves      (S) names that change hands
    tables     a table for each state of discovery   udp, tcp   the client's side
    batch      many datagrams in one system call     foreign    cache or upstream, and when neither has it
    forward    attempts, time-outs, coalescing       alike       questions about one name
    upstream, pipeline, https, exchange   the other side
"""

from dnsgw.config import DnsConfig
from dnsgw.metrics import DnsMetrics, Outcome
from dnsgw.server import DnsServer, UpstreamLoop
from dnsgw.upstream.host_resolvers import Endpoint

__all__ = ["DnsConfig", "DnsMetrics", "DnsServer", "Endpoint", "Outcome", "UpstreamLoop"]
