"""Who is where: names, records, stores, the HTTP API and its client. Sees no traffic."""
