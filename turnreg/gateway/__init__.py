"""The gateway: accepts streams from relays of other networks and delivers them to services of its own network."""
