"""The protocol between relay and gateway: preamble, capsules, the states of a stream, and both ends of its handshake."""
