"""A TURN client: control connection, one TCP allocation, permissions, and binding the peers that connect."""
