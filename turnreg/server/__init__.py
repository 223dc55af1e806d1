"""The embedded TURN server: TCP allocations (RFC 6062) with back-pressure where others drop bytes."""
