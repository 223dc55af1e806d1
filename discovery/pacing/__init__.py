"""How often: rates, and pauses between attempts. Shared by all packages, since all stand on this one. Sans-IO."""
