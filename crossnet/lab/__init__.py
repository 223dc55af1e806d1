"""Two isolated networks on this machine, every part of crossnet in them as real processes, and unmodified clients.

Not for production: its keys and certificates are made for one run and then deleted.
"""
