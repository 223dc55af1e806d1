"""Rate limits and backoff. All packages use them, since all may import this one. Sans-IO."""
