"""The protocol between relay and gateway: preamble, capsules, the states of a stream, and the relay's side of its handshake.

PROTOCOL.md says what goes over the wire.
"""
