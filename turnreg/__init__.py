"""The service side: STUN/TURN, registration on other networks' TURN servers, the gateway, the embedded TURN server."""
