"""Discovery: names, records, stores, the HTTP API and its client. It never sees traffic.

Start with `model.names` (what a name means), `model.mesh` (records, and the mesh of all records) and `model.lookup` (from
names to records). Roles get a `client.contract.Discovery`: a `client.client.DiscoveryClient` for servers, or a
`client.mesh_file.StaticDiscovery` for a file. The server is `api.DiscoveryServer` over a `store`.

Nothing is exported from here, so that the sans-IO modules can be imported without an HTTP library.
"""
