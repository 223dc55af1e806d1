"""Standard formats, parsed and written without sockets: ClientHello, TLS alert, PROXY protocol."""
