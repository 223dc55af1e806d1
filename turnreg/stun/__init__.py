"""STUN and TURN as messages and credentials, shared by client and server. Sans-IO."""
