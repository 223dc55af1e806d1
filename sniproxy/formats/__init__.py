"""Formats that are not ours, each parsed and written without a socket: ClientHello, TLS alert, PROXY protocol."""
