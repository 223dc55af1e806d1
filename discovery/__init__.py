"""Who is where: names, records, stores, the HTTP API and its client. Sees no traffic.

Begin with `names` (what a name means), `model` (records and the mesh that they make) and `lookup` (from one to the
other). Roles are given a `contract.Discovery`: `client.DiscoveryClient` for a server, `static.StaticDiscovery` for a
file. The server is `api.DiscoveryServer` over a `store`.

Nothing is exported from here, so that the sans-IO modules can be had without an HTTP library.
"""
