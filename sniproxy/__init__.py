"""The client side: reads the server name in a ClientHello, chooses a route and carries the stream there."""
