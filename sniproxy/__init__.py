"""The client side: reads the name in the ClientHello, picks a route and carries the stream there."""
