"""HTTP servers and clients of ours: bounded listeners, fair turns, rates, and failures in words."""
