"""The gateway: takes streams from other networks' relays and delivers them to services of its own network."""
