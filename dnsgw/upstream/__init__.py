"""The names that are not ours: the cache, and the servers that are asked."""
