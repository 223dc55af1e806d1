"""Files that people and tools replace while we run: YAML, TLS, and whether any has changed."""
