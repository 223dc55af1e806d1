"""How a relay gets to another network's gateway, or to a service of its own network."""
