"""Names that are not ours: the cache, and the upstream servers."""
