"""The client of a discovery server, and the interface that roles see."""

from discovery.contract import Discovery, DiscoveryError, IssuedCredentials

__all__ = ["Discovery", "DiscoveryError", "IssuedCredentials"]
