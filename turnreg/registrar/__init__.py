"""Keeps allocations on every TURN server of every other network that we have credentials for."""
