"""A client of a TURN server: its control connection, one TCP allocation, permissions, and the peers that connect."""
