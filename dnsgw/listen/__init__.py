"""Where clients' questions come in: UDP, TCP, and whose turn it is."""
