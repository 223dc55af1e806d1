"""The listening side: UDP, TCP, and fair shares for clients."""
