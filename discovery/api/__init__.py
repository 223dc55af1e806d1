"""The discovery server: records, leases and watches over HTTP.

    GET    /                                     a page for people; a browser gives the token as a Basic password
    GET    /healthz                              open to all
    GET    /v1/records?kind=&network=            {"epoch","revision","records"}
    GET    /v1/records/{kind}/{network}/{id}     the record, its revision as ETag too
    PUT    …                                     {"spec":{…},"lease":"…"}; If-Match: REV, If-None-Match: *
    DELETE …                                     {"revision"}
    GET    /v1/watch?from=REV&epoch=EPOCH        lines of JSON: put, delete, sync, reset
    POST   /v1/leases                            {"ttl_s":10} → {"id","ttl_s"}
    PUT    /v1/leases/{id}                       renews
    DELETE /v1/leases/{id}                       ends it and withdraws its records
    POST   /v1/turn-credentials                  {"network":"d"} → {"username","password","ttl_s","urls"}

Every answer has the store's epoch in the header Crossnet-Epoch; where the store has not been confirmed to be current for
some time, Crossnet-Stale says for how many seconds. Errors are {"error": CODE, "detail": sentence}.
"""

from discovery.api.config import DiscoveryServerConfig, ServerRefused, start_refusals
from discovery.api.messages import EPOCH_HEADER
from discovery.api.server import DiscoveryServer

__all__ = ["EPOCH_HEADER", "DiscoveryServer", "DiscoveryServerConfig", "ServerRefused", "start_refusals"]
