"""Keeps one allocation on every TURN server of every other network that we have credentials for."""
