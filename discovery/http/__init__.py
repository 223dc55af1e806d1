"""Shared parts of our HTTP servers and clients: bounded listeners, fair scheduling, rate limits, error descriptions."""
