"""Discovery for roles: the current mesh, and their own records, by servers, a file, or both."""
