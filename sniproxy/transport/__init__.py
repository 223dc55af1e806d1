"""How a relay reaches a gateway of another network, or a service of its own network."""
