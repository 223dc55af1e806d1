"""The names that this resolver answers itself, from the state of discovery. Sans-IO."""
