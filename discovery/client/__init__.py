"""What a role has of discovery: the current mesh, and its own records kept true, from servers, a file, or both."""
