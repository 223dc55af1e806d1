"""The protocol between relay and gateway: preamble, capsules, the states of a stream, and the relay's side of the handshake.

PROTOCOL.md describes the wire format.
"""
