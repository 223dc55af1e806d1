"""Endpoints of services: which of them answer, and how one of them is reached. The relay's local route and the gateway share it."""
