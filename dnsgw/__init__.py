"""The resolver: cross-network names get the relay's address, everything else goes upstream unchanged."""
